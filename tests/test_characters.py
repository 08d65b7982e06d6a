"""nanoGPT's character data as it is, and pickles that are none."""

import os
import pickle
import pickletools

import numpy as np
import pytest

from text import characters
from text.tokenizer import get_tokenizer

TEXT = "First Citizen:\nBefore we proceed any further, hear me speak.\n\nAll:\nSpeak, speak.\n" * 60
KNOWN = sorted({*TEXT})


def write(folder, characters=KNOWN, protocol=4):
    """A folder as nanoGPT's data/shakespeare_char/prepare.py leaves it."""
    stoi = {c: i for i, c in enumerate(characters)}
    meta = {"vocab_size": len(stoi), "itos": {i: c for c, i in stoi.items()}, "stoi": stoi}
    folder.mkdir(exist_ok=True)
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta, protocol))
    for split, text in (("train", TEXT), ("val", TEXT[:600])):
        ids = [stoi.get(c, 0) for c in text]
        np.array(ids, dtype=np.uint16).tofile(folder / f"{split}.bin")
    return folder


def test_it_trains_samples_and_exports(script, tmp_path):
    data, out = write(tmp_path / "shakespeare_char"), tmp_path / "out"
    sizes = (
        "hidden_size=16 intermediate_size=16 num_hidden_layers=1 num_attention_heads=2 head_dim=8"
    )
    flags = [f"--{s}" for s in f"{sizes} num_key_value_heads=1 max_position_embeddings=32".split()]
    flags += ["--max_iters=3", "--tokens_per_step=64", "--batch_size=2", "--compile=False"]
    result = script("train.py", f"--dataset={data}", f"--out_dir={out}", *flags)
    assert result.code == 0, result.err
    assert "its ids are characters" in result.out and "WARNING" not in result.out
    for start in ("", "Speak"):
        what = (f"--out_dir={out}", f"--start={start}", "--num_samples=1", "--max_new_tokens=20")
        result = script("sample.py", *what, "--device=cpu")
        assert result.code == 0 and {*result.out} <= {*KNOWN}, result
    result = script("sample.py", f"--out_dir={out}", "--start=Zebra")
    assert result.code == 1 and "no token for 'Z'" in result.err
    assert script("evaluate.py", f"--out_dir={out}").code == 0
    result = script("export.py", f"--out_dir={out}")
    assert result.code == 0, result.err
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(out / "hf")
    ours = get_tokenizer("meta.pkl", data)
    assert (
        theirs.encode(TEXT[:200]) == ours.encode(TEXT[:200]) == [KNOWN.index(c) for c in TEXT[:200]]
    )
    assert theirs.decode(ours.encode(TEXT[:200])) == TEXT[:200]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_every_protocol_of_a_vocabulary_is_read(tmp_path, protocol):
    letters = [*map(chr, range(32, 127)), "é", "世", "🙂"]
    write(tmp_path / "d", letters, protocol)
    assert characters.read(tmp_path / "d" / "meta.pkl") == letters


class Evil:
    def __reduce__(self):
        return os.system, ("touch evil",)


def hostile():
    good = {"stoi": {"a": 0, "b": 1}}
    yield "code", pickle.dumps({**good, "x": Evil()})
    yield "only code", pickle.dumps(Evil())
    yield "a class", pickle.dumps({"stoi": {"a": Evil}})
    yield "code in protocol 0", b"cos\nsystem\n(S'touch evil'\ntR."
    yield "an array", pickle.dumps({"stoi": np.arange(3)})
    yield "no vocabulary", pickle.dumps({"itos": {}})
    yield "a list", pickle.dumps(["a"])
    yield "gaps", pickle.dumps({"stoi": {"a": 0, "b": 2}})
    yield "words", pickle.dumps({"stoi": {"ab": 0}})
    yield "no dict", pickle.dumps({"stoi": "ab"})
    yield "cut", pickle.dumps(good)[:-8]
    yield "nothing", b""
    yield "noise", bytes(range(256))
    yield "an empty stack", b"."
    yield "a lone mark", b"(u."
    yield "memory that is not there", b"\x80\x04h\x09."
    yield "an unhashable key", b"\x80\x04}}K\x01s."
    yield "a dict in itself", b"\x80\x04}q\x00X\x04\x00\x00\x00stoih\x00s."
    yield "a long number", b"\x80\x04\x8a\xff" + b"\xff" * 255 + b"."


@pytest.mark.parametrize("name", dict(hostile()))
def test_hostile_pickles_run_nothing(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "meta.pkl").write_bytes(dict(hostile())[name])
    with pytest.raises(ValueError, match="--tokenizer=bytes") as e:
        characters.read(tmp_path / "meta.pkl")
    assert "\n" not in str(e.value)
    assert os.listdir(tmp_path) == ["meta.pkl"]


def test_a_large_pickle_is_not_read(tmp_path):
    with open(tmp_path / "meta.pkl", "wb") as f:
        f.truncate(characters.MAX_PICKLE + 1)
    with pytest.raises(ValueError, match="too many"):
        characters.read(tmp_path / "meta.pkl")


def test_no_opcode_that_is_taken_can_run_anything():
    """Against the standard library's own list: nothing that calls, imports or builds."""
    taken = characters.VALUES | characters.IDLE
    risky = {"GLOBAL", "STACK_GLOBAL", "REDUCE", "BUILD", "INST", "OBJ", "NEWOBJ", "NEWOBJ_EX"}
    assert not taken & risky and taken <= {op.name for op in pickletools.opcodes}
