"""What the checks on a GPU share: the device, a tiny dataset, a script's run, runs side by side.

`--device=cpu` tries the checks themselves where there is no GPU: with a smaller model, graphs that
are traced but not compiled, and without what only CUDA has.
"""

import json
import os
import runpy
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny and runs stand side by side
# Attention by the kernels that consumer cards have, on a data centre's card, too. It is read once.
os.environ.setdefault("TORCH_CUDNN_SDPA_DEPRIORITIZED", "1")

import numpy as np
import pytest
import torch

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from .job import without_codegen  # noqa: E402

TEXT = "the cat sat on the mat and the dog sat on the log. " * 400
UPDATES = 20  # of a whole run; half of them until its checkpoint in the middle
BATCH = 8  # windows in a micro-batch, of which an update has two
WINDOWS = 2 * BATCH

WHY = pytest.StashKey[str]()  # nothing here runs

SIZES = {
    "cuda": {
        "vocab_size": 8192,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 4,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "max_position_embeddings": 512,
    },
    "cpu": {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    },
}


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the tests")


def device_of(config):
    """The option; where this file was found too late to have one, a GPU."""
    return config.getoption("--device", default="cuda")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Without a GPU nothing here runs."""
    if device_of(config) == "cpu" or torch.cuda.is_available():
        return
    why = (
        f"torch {torch.__version__} finds none" if torch.version.cuda else "this torch has no CUDA"
    )
    skip = pytest.mark.skip(reason=f"needs an NVIDIA GPU that torch can use; {why}")
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(skip)
            config.stash[WHY] = skip.kwargs["reason"]


def pytest_terminal_summary(terminalreporter, config):
    """Why nothing ran, which pytest keeps to itself without -rs."""
    if WHY in config.stash:
        terminalreporter.write_line(f"tests/gpu was skipped: {config.stash[WHY]}")


@pytest.fixture(scope="session")
def where(request):
    """The device."""
    return torch.device("cuda:0" if device_of(request.config) == "cuda" else "cpu")


@pytest.fixture
def only_cuda(where):
    """For what a CPU has not."""
    if where.type != "cuda":
        pytest.skip("about CUDA alone: nothing of it can be tried on a CPU")


@pytest.fixture(autouse=True)
def exact(where):
    """Float32 in all its bits, which scripts run in this process may have switched off."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture
def compiler(where):
    """torch.compile, on a CPU without its code generator."""
    torch._dynamo.reset()
    if where.type == "cuda":
        yield
    else:
        with without_codegen():
            yield


class Result(NamedTuple):
    code: int
    out: str
    err: str


@pytest.fixture
def script(monkeypatch, capsys):
    """Run a script in this process, as `python NAME ARGS` would."""

    def run(name, *args):
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        capsys.readouterr()
        code = 0
        try:
            runpy.run_path(str(ROOT / name), run_name="__main__")
        except SystemExit as e:
            code = e.code or 0
        return Result(code, *capsys.readouterr())

    return run


@pytest.fixture(scope="session")
def dataset(tmp_path_factory):
    """A folder of byte tokens as data/prepare.py writes it."""
    folder = tmp_path_factory.mktemp("data") / "tiny"
    folder.mkdir()
    splits = {}
    for split, text in (("train", TEXT), ("val", TEXT[:9000])):
        ids = [*text.encode(), 256]
        np.array(ids, dtype="<u2").tofile(folder / f"{split}.bin")
        splits[split] = {"tokens": len(ids), "bytes": len(text), "documents": 1, "max_id": 256}
    meta = {"tokenizer": "bytes", "vocab_size": 257, "dtype": "uint16", "splits": splits}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    return folder


class Run(NamedTuple):
    """One run of a job."""

    folder: Path
    code: int
    out: str
    err: str
    updates: list  # a dict for each: iter, loss, graphs, symbols, and on a GPU peak
    scales: list  # of the gradients, after each update

    def losses(self):
        """Training loss by update, from the log."""
        lines = (self.folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return {r["iter"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}

    def checkpoint(self, step):
        from formats import checkpoint

        return checkpoint.load(self.folder / f"ckpt_{step}.pt")


def specs(folder, dataset, kind):
    """The runs of each job: those of one job after each other, jobs side by side."""
    size = SIZES[kind]
    flags = [f"--{name}={value}" for name, value in size.items()]
    flags += [f"--dataset={dataset}", f"--device={kind}", f"--batch_size={BATCH}"]
    flags += [f"--tokens_per_step={WINDOWS * size['max_position_embeddings']}"]
    flags += [f"--max_iters={UPDATES}", f"--lr_decay_iters={UPDATES}", "--warmup_iters=2"]
    flags += ["--learning_rate=1e-3", "--min_lr=1e-4", f"--eval_interval={UPDATES // 2}"]
    flags += ["--eval_iters=1", "--log_interval=1", "--watchdog_minutes=3"]
    flags += [f"--dtype={'bfloat16' if kind == 'cuda' else 'float32'}"]
    eager, compiled = [*flags, "--compile=False"], [*flags, "--compile=True"]
    short = ["--max_iters=6"]

    def run(name, flags, *more, **plan):
        return {"folder": str(folder / name), "flags": [*flags, *more], **plan}

    def resumed(name, flags, of, suffix="pt", **plan):
        """On from the checkpoint in the middle of a run."""
        start = folder / of / f"ckpt_{UPDATES // 2}.{suffix}"
        return run(name, flags, "--init_from=resume", start=str(start), **plan)

    same = "--deterministic=True"
    half = [same, f"--max_iters={UPDATES // 2}"]
    sharded = [*eager, "--parallel=fsdp", "--sharded_checkpoints=True"]
    scaled = [*eager, *short, *(["--dtype=float16"] if kind == "cuda" else [])]
    return {
        "whole": [run("whole", eager, same), run("whole_c", compiled, same)],
        "halves": [
            run("halves", eager, *half),
            run("halves", eager, same, "--init_from=resume"),
            run("halves_c", compiled, *half),
            run("halves_c", compiled, same, "--init_from=resume"),
        ],
        "plain": [run("plain", compiled, peaks=True), resumed("plain_on", compiled, "plain")],
        "short": [
            run(
                *("short", compiled, *short, f"--batch_size={WINDOWS}"),
                **{"fits": BATCH, "windows": WINDOWS, "size": size},
            )
        ],
        "saving": [run("saving", compiled, *short, "--activation_checkpointing=True", peaks=True)],
        "sharded": [
            run("sharded", sharded, torchrun=True),
            resumed("sharded_on", sharded, "sharded", "shards", torchrun=True),
        ],
        "eager": [
            run("eager", eager, peaks=True),
            resumed("eager_on", eager, "eager"),
            run("scaled", scaled, inf_at=3),
        ],
    }


class Jobs:
    """Processes of job.py, several at once: what takes their time is compilers, not the card."""

    def __init__(self, folder, dataset, where):
        self.folder, self.where = folder, where
        self.specs = specs(folder, dataset, where.type)
        self.pool = ThreadPoolExecutor(max(2, (os.cpu_count() or 1) // 2))
        self.found, self.processes, self.lock = {}, [], threading.Lock()
        self.ended = False

    def start(self, name):
        self.found[name] = self.pool.submit(self.work, name)

    def work(self, name):
        """Starts the process, waits for it, returns its Runs."""
        plan, report = self.folder / f"{name}.spec", self.folder / f"{name}.report"
        spec = {"device": str(self.where), "report": str(report), "runs": self.specs[name]}
        plan.write_text(json.dumps(spec), encoding="utf-8")
        path = os.pathsep.join([str(ROOT), str(HERE.parent)])
        env = {**os.environ, "PYTHONPATH": path, "TORCHINDUCTOR_COMPILE_THREADS": "4"}
        env.pop("CUBLAS_WORKSPACE_CONFIG", None)  # train.py is to set it
        # as train.py does, which here comes after torch
        env.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")
        if name in ("whole", "halves"):  # each compiles for itself, as on two machines
            env["TORCHINDUCTOR_CACHE_DIR"] = str(self.folder / f"{name}.cache")
            env["TRITON_CACHE_DIR"] = str(self.folder / f"{name}.triton")
        command = [sys.executable, "-m", "gpu.job", str(plan)]
        with self.lock:
            if self.ended:
                raise RuntimeError("the tests are over")
            process = subprocess.Popen(
                command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
            self.processes.append(process)
        text, _ = process.communicate(timeout=400)
        if process.returncode:
            raise RuntimeError(f"job {name} ended with {process.returncode}: {text[-4000:]}")
        reports = json.loads(report.read_text(encoding="utf-8"))
        return [
            Run(Path(run["folder"]), **{"updates": [], "scales": [], **done})
            for run, done in zip(self.specs[name], reports, strict=True)
        ]

    def __getitem__(self, name):
        """The runs of a job, all of which must have ended well."""
        if name not in self.found:  # whose name is a parameter's value
            self.start(name)
        runs = self.found[name].result()
        for run in runs:
            assert run.code == 0, f"{run.folder.name}: {run.err[-3000:]}"
        return runs

    def end(self):
        with self.lock:
            self.ended = True
            for process in self.processes:
                if process.poll() is None:
                    process.kill()
        self.pool.shutdown()


@pytest.fixture(scope="session")
def jobs(request, tmp_path_factory, dataset, where):
    """The jobs, of which those run that tests are to look at."""
    found = Jobs(tmp_path_factory.mktemp("jobs"), dataset, where)
    names = {name for item in request.session.items for name in item.fixturenames}
    for name in found.specs:
        if name in names:
            found.start(name)
    yield found
    found.end()


@pytest.fixture(scope="session", autouse=True)
def early(request):
    """Jobs start with the first test, not with the first that waits for one."""
    if any("jobs" in item.fixturenames for item in request.session.items):
        request.getfixturevalue("jobs")
