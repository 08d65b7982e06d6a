"""docs/datatrove.md, run with the real package where it is installed."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY

from text.tokenizer import get_tokenizer
from text.tokens import TokenData

pytest.importorskip("datatrove")
pytest.importorskip("orjson")
TEXTS = [f"Document {i}: " + "the cat sat on the mat. " * (1 + i % 7) for i in range(300)]


@pytest.fixture(scope="module")
def workplace(tmp_path_factory):
    """The page's script, run in a folder with three files of text and a tokenizer.json."""
    import tokenizers
    from tokenizers import decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("datatrove")
    (folder / "text").mkdir()
    for i in range(3):
        lines = [json.dumps({"text": t}) + "\n" for t in TEXTS[i::3]]
        (folder / "text" / f"{i}.jsonl").write_text("".join(lines), encoding="utf-8")
    tok = tokenizers.Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok.decoder = decoders.ByteLevel()
    tok.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
            show_progress=False,
        ),
    )
    tok.save(str(folder / "tokenizer.json"))
    page = (ROOT / "docs" / "datatrove.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    for old, new in (
        ("TASKS, WORKERS = 64, 8", "TASKS, WORKERS = 4, 1"),
        ("VAL = 2000", "VAL = 9"),
    ):
        assert old in code
        code = code.replace(old, new)
    (folder / "my_datatrove.py").write_text(code, encoding="utf-8")
    command = [sys.executable, "my_datatrove.py"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return folder


def test_every_document_is_there_once(workplace):
    out = workplace / "data" / "mine"
    tok = get_tokenizer("tokenizer.json", out)
    found = []
    for split in ("train", "val"):
        data = TokenData(out, split, 8, tok.vocab_size)
        ids = data.windows(np.array([0]), data.tokens)[0]
        ends = np.flatnonzero(ids == tok.eot)
        assert ends[-1] == len(ids) - 1
        texts = [tok.decode(part.tolist()) for part in np.split(ids, ends + 1)[:-1]]
        assert len(texts) > 10
        found += texts
    assert sorted(found) == sorted(TEXTS)


def test_train_runs_on_it(workplace, script, tmp_path):
    flags = [f"--dataset={workplace / 'data' / 'mine'}", f"--out_dir={tmp_path / 'out'}"]
    result = script("train.py", *TINY, *flags, "--max_iters=3", "--eval_interval=3")
    assert result.code == 0, result.err
    assert (tmp_path / "out" / "best.pt").exists()


def test_a_lost_marker_is_noticed(workplace, tmp_path):
    """The layout that test_dataloader writes by hand is the package's own."""
    logs = workplace / "data" / "mine" / "train" / "logs"
    assert sorted(os.listdir(logs / "completions")) == ["00000", "00001", "00002", "00003"]
    marker = logs / "completions" / "00002"
    marker.unlink()
    try:
        with pytest.raises(ValueError, match="1 of 4 datatrove tasks"):
            TokenData(workplace / "data" / "mine", "train", 8, 320)
    finally:
        marker.touch()
