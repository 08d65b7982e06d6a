"""bench.py on toy shapes: what it prints is there, and its memory is the planner's."""

import re
import subprocess
import sys

import pytest
import torch

import bench
import memory

TOY = ["--layers=1", "--hidden=64", "--batch=1", "--context=32", "--repeats=1", "--mode=eager"]
PEER = """
from dataclasses import dataclass
import torch
from torch.nn import functional as F

@dataclass
class GPTConfig:  # as nanoGPT's
    block_size: int = 8
    vocab_size: int = 8
    n_layer: int = 1
    n_head: int = 1
    n_embd: int = 8
    bias: bool = True

class GPT(torch.nn.Module):
    def __init__(self, c):
        super().__init__()
        assert (c.block_size, c.n_layer, c.n_embd, c.bias) == (32, 1, 64, False)
        print("peers may print")
        self.table = torch.nn.Embedding(c.vocab_size, c.n_embd)

    def forward(self, x, y):
        logits = self.table(x) @ self.table.weight.T
        return logits, F.cross_entropy(logits.flatten(0, 1), y.flatten())
"""


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--what=speed", "what must be"),
        ("--cases=1by64", "cases"),
        ("--dtype=float16", "float32 or bfloat16"),
        ("--repeats=0", "at least 1"),
    ],
)
def test_a_mistake_is_one_line(script, flag, words):
    result = script("bench.py", flag)
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1, result.err


def test_measured_memory_is_the_planned():
    """Two ways to one number: the allocator's events, and the graph on fake tensors."""
    shape = bench.Shape(layers=2, hidden=64, batch=3, context=64)
    training = memory.Training(shape.size, torch.float32, "cpu", False, False, False)
    planned = sum(memory.at_peak(training, shape.batch).values())
    measured = bench.peak_memory("ours", False, shape, "float32")
    assert measured == pytest.approx(planned, rel=0.05)


def test_a_peer_that_fails_is_told_of(tmp_path):
    """In a process of its own, whose error is a line, too."""
    pytest.importorskip("transformers")
    command = ["bench.py", "--what=train", *TOY, f"--peer={tmp_path / 'model.py'}"]
    result = subprocess.run(
        [sys.executable, *command], cwd=bench.ROOT, capture_output=True, text=True, encoding="utf-8"
    )
    assert result.returncode == 1 and "No such file" in result.stderr, result.stderr
    assert "made no step" in result.stderr and "Traceback" not in result.stderr, result.stderr


@pytest.mark.slow
def test_a_peer_stands_in_the_training_table(script, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "toy").mkdir()
    peer = tmp_path / "toy" / "model.py"
    peer.write_text(PEER, encoding="utf-8")
    png = tmp_path / "bars.png"
    result = script("bench.py", "--what=train", *TOY, f"--peer={peer}", f"--png={png}")
    assert result.code == 0, result.err
    rows = re.findall(
        r"^\| (\w+), eager \| [\d,]+ \| [\d.]+ \| \d+% \| ([\d,]+) \|$", result.out, re.M
    )
    assert [name for name, _ in rows] == ["ours", "transformers", "toy"]
    assert all(int(mb.replace(",", "")) > 0 for _, mb in rows)
    assert png.read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_all_ways_to_make_text_stand_in_the_table(script):
    pytest.importorskip("transformers")
    flags = ["--what=decode", *TOY, "--cases=1x4,2x3", "--new_tokens=5"]
    result = script("bench.py", *flags)
    assert result.code == 0, result.err
    assert "ours, eager: 5 of 5 tokens as transformers's" in result.out, "the same greedy text"
    for way in ("transformers", "ours, eager", "ours, int8, eager"):
        assert result.out.count(f"\n| {way} |") == 2
