"""The sampling script: what it prints where, and what a slip of a user gets."""

import dataclasses
import io
import re
import sys

import pytest
import torch
from torch._dynamo.utils import counters

import sample
from formats import checkpoint
from model import GPT, GPTConfig
from run import compiling
from run.machine import Machine
from text.tokenizer import get_tokenizer

LINE = "-" * 40 + "\n"
SIZE = GPTConfig(
    vocab_size=320,  # 257 rounded up: the rows beyond must never be drawn
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=16,
    max_position_embeddings=24,
)


def save(path, model):
    """As train.py would with --tokenizer=bytes."""
    state = {
        "model": model.state_dict(),
        "model_args": dataclasses.asdict(model.config),
        "tokenizer": {"name": "bytes", "vocab_size": 257, "json": None},
    }
    checkpoint.save(path, state)


@pytest.fixture
def typed(monkeypatch):
    """Put lines into what a script reads of the keyboard."""

    def put(*lines):
        text = "".join(f"{line}\n" for line in lines)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))

    return put


@pytest.fixture
def out(tmp_path):
    """A folder with a checkpoint of random weights whose favourites are padded vocabulary rows."""
    torch.manual_seed(0)
    model = GPT(SIZE)
    with torch.no_grad():
        model.embed_tokens.weight[257:] *= 20
        model.embed_tokens.weight[128:257] *= 0.1  # mostly ASCII
    folder = tmp_path / "out"
    folder.mkdir()
    save(folder / "ckpt_3.pt", model)
    return folder


@pytest.fixture
def longer(tmp_path):
    """As `out`, with a context of 256 tokens."""
    torch.manual_seed(0)
    save(tmp_path / "ckpt_1.pt", GPT(dataclasses.replace(SIZE, max_position_embeddings=256)))
    return tmp_path


def test_text_on_stdout_and_the_rest_on_stderr(script, out):
    flags = [f"--out_dir={out}", "--start=Once", "--num_samples=2", "--max_new_tokens=40"]
    result = script("sample.py", *flags)
    assert result.code == 0, result.err
    first, second = result.out.split("-" * 40 + "\n")
    assert first.startswith("Once") and second.startswith("Once") and first != second
    assert "ckpt_3.pt" in result.err and "tokens/s" in result.err
    assert script("sample.py", *flags).out == result.out, "a seed fixes the text"
    assert script("sample.py", *flags, "--seed=2").out != result.out


def test_greedy_texts_are_equal_and_longer_than_the_context(script, out):
    flags = [f"--out_dir={out}", "--start=ab", "--num_samples=2", "--max_new_tokens=60"]
    texts = script("sample.py", *flags, "--temperature=0").out.split("-" * 40 + "\n")
    assert texts[0] == texts[1] and len(texts[0].encode()) >= 30


@pytest.mark.parametrize("flag", ["--temperature=0", "--top_k=1"])
def test_greedy_texts_are_what_they_are_alone(script, out, flag):
    flags = [f"--out_dir={out}", "--start=ab", "--max_new_tokens=30", flag]
    alone = script("sample.py", *flags, "--num_samples=1")
    several = script("sample.py", *flags, "--num_samples=9")
    assert several.out.split(LINE) == [alone.out] * 9
    assert "60 tokens, " in several.err, "two batches, of each one text"


def test_more_texts_than_a_batch_are_all_different(script, out):
    flags = [f"--out_dir={out}", "--start=ab", "--num_samples=10", "--max_new_tokens=30"]
    result = script("sample.py", *flags)
    texts = result.out.split(LINE)
    assert len(texts) == len(set(texts)) == 10 and all(t.startswith("ab") for t in texts)


def rows_of(text):
    """Columns of bytes, of texts that end with the byte tokenizer's end of text."""
    ends = 256
    width = max(map(len, text)) + 1
    rows = [[*t.encode(), *[ends] * (width - len(t))] for t in text]
    return [list(column) for column in zip(*rows, strict=True)]


def test_texts_come_in_order_the_first_as_it_is_made(capsys):
    tok = get_tokenizer("bytes")
    writer = sample.Writer(tok, ["", "-", "+"])
    seen = []
    for tokens in rows_of(["abcd", "e", "fg"]):
        writer.push(tokens)
        seen.append(capsys.readouterr().out)
    assert seen == ["a", "b", "c", "d", "\n-e\n+fg\n"]
    assert not writer.going and writer.count == 7
    writer = sample.Writer(tok, ["", "-"])
    for tokens in rows_of(["a", "bcd"])[:3]:
        writer.push(tokens)
    writer.close()
    assert capsys.readouterr().out == "a\n-bcd\n"


def test_a_prompt_from_a_file(script, out, tmp_path):
    (tmp_path / "p.txt").write_text("naïve 世界", encoding="utf-8")
    flags = [f"--out_dir={out}", f"--start=FILE:{tmp_path / 'p.txt'}", "--max_new_tokens=3"]
    assert script("sample.py", *flags).out.startswith("naïve 世界")


@pytest.mark.parametrize(
    "flags",
    [
        ["--start="],
        ["--start=123"],
        ["--top_k=100000"],
        ["--top_k=0"],
        ["--temperature=0"],
        ["--temperature=1"],
        ["--min_p=0.1", "--top_p=0.9", "--repetition_penalty=1.2"],
        ["--dtype=bfloat16"],
        ["--quantize=int8", "--device=cpu"],
        ["--quantize=int8", "--device=cpu", "--dtype=bfloat16"],
    ],
)
def test_settings_that_must_work(script, out, flags):
    result = script("sample.py", f"--out_dir={out}", "--max_new_tokens=5", *flags)
    assert result.code == 0, result.err


def test_a_prompt_longer_than_the_context_is_cut_with_a_word(script, out):
    flags = [f"--out_dir={out}", "--start=" + "x" * 30, "--num_samples=1", "--max_new_tokens=3"]
    result = script("sample.py", *flags)
    assert result.code == 0
    assert "30 tokens" in result.err and "last 24" in result.err


def test_interactive_asks_until_an_empty_line(script, out, typed):
    typed("first", "second", "", "third")
    result = script("sample.py", f"--out_dir={out}", "--interactive", "--max_new_tokens=4")
    assert result.code == 0
    assert "first" in result.out and "second" in result.out and "third" not in result.out


@pytest.mark.parametrize("problem", ["", "RuntimeError: no compiler today"])
def test_compiling_is_told_and_when_it_fails_the_text_comes_all_the_same(
    script, out, monkeypatch, problem
):
    from making import compiled

    asked = []
    monkeypatch.setattr(
        compiled, "compile_decode", lambda model, *rest: asked.append(rest) or problem
    )
    monkeypatch.setattr("run.compiling.why_not_compile", lambda where: "")
    flags = [f"--out_dir={out}", "--start=ab", "--device=cpu", "--max_new_tokens=5"]
    result = script("sample.py", *flags, "--compile=True")
    assert result.code == 0 and result.out == script("sample.py", *flags).out
    assert asked == [(24, 3)], "the cache's size and the texts of a batch, once for all"
    assert (problem or "done in") in result.err


@pytest.mark.parametrize(
    ("settings", "small", "wanted"),
    [
        ({}, 1e6, "float32"),
        ({}, 1e3, "bfloat16"),  # the model is larger
        ({"dtype": "bfloat16"}, 1e6, "bfloat16"),
        ({"compile": True}, 1e6, "bfloat16"),  # half as much to read, and no calls
        ({"quantize": "int8"}, 1e6, "float32"),
    ],
)
def test_a_small_model_is_quicker_in_float32(settings, small, wanted, monkeypatch):
    """On a CPU that computes in bfloat16: a product of few numbers costs more there."""
    for name, value in settings.items():
        monkeypatch.setattr(sample, name, value)
    monkeypatch.setattr(sample, "SMALL", small)
    model = GPT(SIZE)
    found = sample.prepare(model, Machine(torch.device("cpu"), torch.bfloat16, ""))
    assert str(found.dtype) == str(model.embed_tokens.weight.dtype) == f"torch.{wanted}"


@pytest.mark.parametrize(
    ("a_thread", "set_by_hand", "wanted"),
    [(2**24, "", [1]), (2**14, "", [4]), (1, "", [8]), (2**24, "5", [])],
)
def test_threads_are_as_many_as_the_weights_are_worth(a_thread, set_by_hand, wanted, monkeypatch):
    """71 kB of them, on a CPU of eight cores; who sets OMP_NUM_THREADS has chosen."""
    asked = []
    monkeypatch.delenv("OMP_NUM_THREADS")
    if set_by_hand:
        monkeypatch.setenv("OMP_NUM_THREADS", set_by_hand)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    monkeypatch.setattr(torch, "set_num_threads", asked.append)
    monkeypatch.setattr(sample, "THREAD_BYTES", a_thread)
    sample.prepare(GPT(SIZE), Machine(torch.device("cpu"), torch.float32, ""))
    assert asked == wanted


def test_no_compiler_is_told_once(script, out, monkeypatch):
    monkeypatch.setattr("run.compiling.why_not_compile", lambda where: "no compiler")
    flags = [f"--out_dir={out}", "--start=ab", "--device=cpu", "--max_new_tokens=5"]
    result = script("sample.py", *flags, "--compile=True")
    assert result.code == 0 and result.out == script("sample.py", *flags).out
    assert result.err.count("not compiled: no compiler") == 1 and "compiling" not in result.err


def test_after_a_length_that_fails_none_is_compiled(script, longer, typed, monkeypatch):
    from making import compiled

    asked = []

    def second_fails(model, length, rows):
        assert rows == 1
        asked.append(length)
        return "no" * (len(asked) == 2)

    monkeypatch.setattr(compiled, "compile_decode", second_fails)
    monkeypatch.setattr("run.compiling.why_not_compile", lambda where: "")
    typed("ab", "c" * 100, "d", "e" * 180, "f" * 100)
    flags = [f"--out_dir={longer}", "--interactive", "--max_new_tokens=40", "--device=cpu"]
    result = script("sample.py", *flags, "--compile=True")
    assert result.code == 0 and asked == [128, 192] and "going on without (no)" in result.err


@pytest.mark.skipif(compiling.why_not_compile(torch.device("cpu")) != "", reason="no C++ compiler")
def test_longer_prompts_compile_before_their_text_and_a_length_once(
    script, longer, typed, monkeypatch
):
    """By inductor itself: nothing is left to compile once a text begins."""
    from making import compiled

    prompts = ["ab", "c" * 100, "d" * 99, "e" * 180, "f"]
    typed(*prompts)
    graphs, real = [], compiled.compile_decode

    def counted(*args):
        before = counters["stats"]["unique_graphs"]
        problem = real(*args)
        graphs.append(counters["stats"]["unique_graphs"] - before)
        return problem

    monkeypatch.setattr(compiled, "compile_decode", counted)
    torch._dynamo.reset()
    before = counters["stats"]["unique_graphs"]
    flags = [f"--out_dir={longer}", "--interactive", "--max_new_tokens=40", "--device=cpu"]
    result = script("sample.py", *flags, "--compile=True", "--temperature=0")
    assert result.code == 0, result.err
    assert f"{40 * len(prompts)} tokens, " in result.err, "a text ended before its time"
    told = re.findall(r"(?s)a cache of (\d+) tokens: .*?done", result.err)  # torch may warn in it
    assert [int(n) for n in told] == [128, 192, 256]
    assert graphs == [1, 1, 1]
    assert counters["stats"]["unique_graphs"] - before == 3, "compiled inside a text"


def test_a_checkpoint_by_its_path(script, out):
    result = script("sample.py", f"--init_from={out / 'ckpt_3.pt'}", "--max_new_tokens=3")
    assert result.code == 0 and "ckpt_3.pt" in result.err


@pytest.mark.parametrize("vocab_size", [320, 50304])
def test_a_checkpoint_that_names_no_tokenizer_is_gpt2s_or_refused(script, tmp_path, vocab_size):
    """nanoGPT's and EasyGPT's files do not."""
    size = dataclasses.replace(SIZE, vocab_size=vocab_size)
    state = {"model": GPT(size).state_dict(), "model_args": dataclasses.asdict(size)}
    torch.save(state, tmp_path / "ckpt.pt")
    result = script("sample.py", f"--out_dir={tmp_path}", "--max_new_tokens=3")
    if vocab_size == 320:
        assert result.code == 1 and "vocabulary of 320" in result.err
    else:
        assert result.code == 0 and "gpt2" in result.err


@pytest.mark.parametrize(
    ("flags", "words", "code"),
    [
        (["--temprature=1"], ["did you mean temperature"], 2),
        (["--temperature=hot"], ["temperature", "hot"], 2),
        (["--temperature=-1"], ["temperature", "-1"], 1),
        (["--seed=99999999999999999999"], ["seed", "64-bit"], 2),
        (["--seed=-1"], ["seed must be at least 0, not -1"], 1),
        (["--top_k=-5"], ["top_k", "-5"], 1),
        (["--top_p=0"], ["top_p"], 1),
        (["--num_samples=0"], ["num_samples must be at least 1, not 0"], 1),
        (["--start=FILE:"], ["names no file", "--start=FILE:PATH"], 1),
        (["--init_from=scratch"], ["is no trained model", "resume"], 1),
        (["--init_from="], ["is no trained model"], 1),
        (["--device=cuda:7"], ["cuda:7"], 1),
        (["--quantize=int4", "--device=cpu"], ["quantize", "int4", "int8"], 1),
        (["--start=FILE:nowhere.txt"], ["nowhere.txt"], 1),
        (["--out_dir=nowhere"], ["no checkpoint in nowhere", "train.py"], 1),
        (["--init_from=nowhere.pt"], ["nowhere.pt"], 1),
    ],
)
def test_mistakes_get_one_line(script, out, flags, words, code):
    where = [] if any("init_from" in flag for flag in flags) else [f"--out_dir={out}"]
    result = script("sample.py", *where, *flags)
    assert result.code == code and result.out == ""
    assert result.err.startswith("sample.py: ") and result.err.count("\n") == 1
    for word in words:
        assert word in result.err


def test_a_prompt_file_that_is_not_utf8(script, out, tmp_path):
    (tmp_path / "p.txt").write_bytes(b"abc\xff")
    result = script("sample.py", f"--out_dir={out}", f"--start=FILE:{tmp_path / 'p.txt'}")
    assert result.code == 1 and "p.txt is not UTF-8" in result.err and result.err.count("\n") == 1


def test_damaged_files_are_named(script, out):
    path = out / "ckpt_3.pt"
    good = path.read_bytes()
    for bad in (b"", good[: len(good) // 2], good[:-1]):
        path.write_bytes(bad)
        result = script("sample.py", f"--out_dir={out}")
        assert result.code == 1 and "ckpt_3.pt" in result.err and result.err.count("\n") == 1


def test_a_terminal_gets_no_control_characters(script, out, monkeypatch):
    """In a file or a pipe the text is as it was made."""
    flags = [f"--out_dir={out}", "--start=a\x1b[2Jb", "--max_new_tokens=30", "--temperature=5"]
    plain = script("sample.py", *flags).out
    assert "\x1b" in plain
    monkeypatch.setattr(sys.stdout.__class__, "isatty", lambda self: True, raising=False)
    shown = script("sample.py", *flags).out
    assert shown.startswith("a·[2Jb") and len(shown) == len(plain)
    assert {c for c in shown if ord(c) < 32} <= {"\n", "\t"}
