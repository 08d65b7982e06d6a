"""bench/ on toy shapes: what is printed is there, stays at Ctrl-C, and memory is the planner's."""

import contextlib
import importlib
import json
import math
import os
import re
import signal
import subprocess
import sys

import pytest
import torch
from conftest import ROOT

from bench import commands, models, settings
from bench.models import Shape
from bench.picture import draw_bars
from bench.trainers import Kind, peak_memory, running
from plan import memory
from text.tokens import TokenData

SMALL = ["--layers=1", "--hidden=64", "--repeats=1", "--mode=eager"]
TOY = [*SMALL, "--batch=1", "--context=32"]
SCRIPTS = sorted(
    path.stem for path in (ROOT / "bench").glob("*.py") if "configure(" in path.read_text("utf-8")
)
posix = pytest.mark.skipif(sys.platform == "win32", reason="has other signals")
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
    ("name", "flag", "words"),
    [
        ("train", "--mode=fast", "mode must be"),
        ("train", "--dtype=float16", "float32 or bfloat16"),
        ("decode", "--cases=1by64", "cases"),
        ("load", "--repeats=0", "at least 1"),
        ("load", "--png=nowhere/a.png", "in a folder that is there"),
        ("growth", "--png=a.jpeg", "png must be a name.png"),
        ("train", "--hidden=65", "multiple of 64"),
        ("decode", "--peer=nowhere/model.py", "there is no file"),
        ("prepare", "--text=nowhere.jsonl", "there is no file"),
        ("decode", "--new_tokens=1", "new_tokens must be at least 2, not 1"),
        ("save", "--updates=9", "at least 100"),
    ],
)
def test_a_mistake_is_one_line(script, name, flag, words):
    result = script(f"bench/{name}.py", flag)
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1, result.err


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_names_the_command_and_each_setting_with_its_comment(script, monkeypatch, name):
    """And modules are looked for in the repository, not in bench/, whose train.py is another."""
    others = [path for path in sys.path if path != str(ROOT)]
    monkeypatch.setattr(sys, "path", [str(ROOT / "bench"), *others])
    result = script(f"bench/{name}.py", "--help")
    assert sys.path == [str(ROOT), *others]
    assert result.code == 0 and result.err == ""
    assert f"python bench/{name}.py" in result.out.splitlines()[0]
    assert re.findall(r"^  --\w+=", result.out, re.M)
    assert not re.findall(r"^  --\S+$", result.out, re.M), "a setting without a comment"


@pytest.mark.parametrize("name", SCRIPTS)
def test_importing_one_does_nothing(monkeypatch, capfd, name):
    """Nor does it change where modules are looked for, or the command line."""
    before = sys.path[:], sys.argv[:]
    monkeypatch.delitem(sys.modules, f"bench.{name}", raising=False)
    module = importlib.import_module(f"bench.{name}")
    assert capfd.readouterr() == ("", "") and (sys.path, sys.argv) == before
    assert module.__doc__


@posix
def test_ctrl_c_keeps_what_has_been_measured(heeded, tmp_path):
    command = [sys.executable, ROOT / "bench" / "load.py", "--repeats=10000"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    env = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(command, cwd=tmp_path, env=env, text=True, **pipes) as process:
        seen = next((line for line in process.stdout if line.startswith("2/")), "nothing")
        process.send_signal(signal.SIGINT)
        table, err = process.stdout.read(), process.stderr.read()
    assert process.returncode == 130 and err == "load.py: interrupted\n"
    assert re.fullmatch(r"2/10000  \d+, \d+, \d+, \d+ microseconds\n", seen)
    assert len(re.findall(r"^\| [^|]+ \| \d+ \| [\d.]+ \|$", table, re.M)) == 4
    assert not [*tmp_path.iterdir()], "what was written is gone"


@posix
def test_an_interrupted_process_ends_with_all_it_has_started():
    sleeper = "import time; time.sleep(20); print('still there')"
    code = f"import subprocess, sys; p = subprocess.Popen([sys.executable, '-c', {sleeper!r}]); "
    code += "print(1, flush=True); p.wait()"
    out, into = os.pipe()
    with open(out, "rb") as pipe:
        with pytest.raises(KeyboardInterrupt), commands.started(["-c", code], stdout=into):
            os.close(into)
            assert pipe.readline() == b"1\n"
            raise KeyboardInterrupt
        assert pipe.read() == b"", "the end of a pipe that nobody holds"


def test_measured_memory_is_the_planned():
    """Two ways to one number: the allocator's events, and the graph on fake tensors."""
    shape = Shape(layers=2, hidden=64, batch=3, context=64)
    training = memory.Training(shape.config, torch.float32, "cpu", False, False, False)
    planned = sum(memory.at_peak(training, shape.batch).values())
    measured = peak_memory(Kind("ours", False, shape, "float32"))
    assert measured == pytest.approx(planned, rel=0.05)


def test_a_peer_that_fails_is_told_of(tmp_path, capfd):
    """In a process of its own, whose error is a line, too."""
    kind = Kind(str(tmp_path / "model.py"), False, Shape(1, 64, 1, 32), "float32")
    with pytest.raises(ValueError, match="made no step"), running(kind) as runner:
        try:
            runner.step()
        finally:
            code = runner.process.wait()
    err = capfd.readouterr().err
    assert code == 1 and "No such file" in err and err.count("\n") == 1, err


@pytest.mark.slow
def test_a_peer_stands_in_the_training_table(script, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "toy").mkdir()
    peer = tmp_path / "toy" / "model.py"
    peer.write_text(PEER, encoding="utf-8")
    png = tmp_path / "bars.png"
    result = script("bench/train.py", *TOY, f"--peer={peer}", f"--png={png}")
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
    result = script("bench/decode.py", *SMALL, "--cases=1x4,2x3", "--new_tokens=5")
    assert result.code == 0, result.err
    assert "ours, eager: 5 of 5 tokens as transformers's" in result.out, "the same greedy text"
    for way in ("transformers", "ours, eager", "ours, int8, eager"):
        assert result.out.count(f"\n| {way} |") == 2


def test_paths_from_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "model.py").touch()
    with pytest.raises(ValueError, match="model.py has no GPT with a GPTConfig"):
        models.load_peer(str(tmp_path / "model.py"))
    assert settings.peers("~/model.py, ") == [str((tmp_path / "model.py").resolve())]
    settings.check(png="~/a.png")
    draw_bars("~/a.png", "t", [("a", 1.0)])
    assert (tmp_path / "a.png").exists()


# --- recipes


@pytest.fixture
def recipes(monkeypatch):
    """bench/recipes.py with runs whose loss is a formula: no training."""
    from bench import recipes

    made = []

    def make(self, runs):
        for run in runs:
            made.append(run)
            write(self, run)

    def write(self, run):
        how = dict(run.how)
        times = float(how["learning_rate"]) * run.size.hidden / 1024 / 3.2e-4
        end = float(how["min_lr"]) / float(how["learning_rate"])
        loss = 4 + 0.1 * abs(math.log2(times / 4)) + end + abs(math.log(how["beta2"] / 0.99))
        loss -= 0.2 * math.log(run.part * run.size.tokens)
        self.kept.mkdir(parents=True, exist_ok=True)
        curve = {**self.head(run), **self.text, "tokens": [0, run.size.tokens * run.part]}
        curve["loss"] = [8.0, loss]
        self.path(run).write_text(json.dumps(curve), encoding="utf-8")

    monkeypatch.setattr(recipes.Bench, "make", make)
    monkeypatch.setattr(recipes, "recipe", lambda size: recipes.adamw(size, (4.0, 0.0, 0.1, 0.99)))
    recipes.made = made
    return recipes


def test_the_sweep_finds_the_best_between_worse_ones(recipes, tmp_path):
    bench = recipes.Bench(tmp_path, tmp_path, tmp_path / "not there", 1.0, 1)
    best = recipes.best_of(bench, recipes.SIZES["0.5"], recipes.REFERENCE, [*recipes.LADDERS])
    assert best == (4.0, 0.0, 0.1, 0.99)
    tried = {dict(run.how)["learning_rate"] for run in recipes.made}
    assert {"0.00512", "0.0102", "0.0205"} <= tried, "worse on both sides"
    assert len({run.key(1) for run in recipes.made}) == len(recipes.made), "none twice"


def test_the_tokens_to_a_loss_lie_between_two_runs():
    from bench.recipes import crossing

    points = [(0.4, 4.4), (0.6, 4.2), (1.0, 4.0)]
    assert crossing(points, 4.2) == pytest.approx(0.6)
    assert crossing(points, 4.1) == pytest.approx(0.6 * (1 / 0.6) ** 0.5)
    assert crossing(points, 4.5) == pytest.approx(0.4 / 1.5**0.5)
    assert math.isnan(crossing(points, 3.9))


def test_recipes_in_a_table_and_a_picture(recipes, tmp_path, monkeypatch, capsys):
    settings = {"dataset": f"{tmp_path / 'text'}{os.sep}", "sizes": "0.5,4", "out_dir": tmp_path}
    settings |= {"curves": tmp_path / "curves", "png": tmp_path / "a.png"}
    for name, value in settings.items():
        monkeypatch.setattr(recipes, name, str(value))
    recipes.main()
    printed = capsys.readouterr().out
    last = printed.rpartition("recipe over it |")[2]
    assert last.count("| reference |") == last.count("| adamw |") == 2
    assert "| 1.00 (1.00 to 1.00) |" in last and (tmp_path / "a.png").stat().st_size > 10_000
    recipes.main()
    assert capsys.readouterr().out == printed
    monkeypatch.setattr(recipes, "dataset", f"{tmp_path / 'other'}{os.sep}")
    with pytest.raises(ValueError, match="json is of text, not of other; take another --curves"):
        recipes.main()
    monkeypatch.setattr(recipes, "dataset", settings["dataset"])
    path = next((tmp_path / "curves").iterdir())
    curve = json.loads(path.read_text(encoding="utf-8"))
    wrong = {"loss": [[], [True, True], [1.0], [8.0, math.nan], [8, 10**400]], "seed": [7]}
    wrong = [curve | {name: value} for name, values in wrong.items() for value in values]
    for damaged in ("", "[1]", "{}", "[" * 100_000, *map(json.dumps, wrong)):
        path.write_text(damaged, encoding="utf-8")
        with pytest.raises(ValueError, match=f"{re.escape(str(path))} is no curve .*; remove it"):
            recipes.main()
    monkeypatch.setattr(recipes, "sizes", "3")
    with pytest.raises(ValueError, match="sizes must be of 0.5, 1.5, 4, 31, 124, not 3"):
        recipes.main()
    for name, value, words in (
        ("dataset", "", "--dataset=PATH"),
        ("dataset", f"{tmp_path}{os.sep}", "no train.bin in"),
        ("curves", str(tmp_path / "a.png"), "a.png is a file, not a folder"),
    ):
        with monkeypatch.context() as patched, pytest.raises((ValueError, OSError), match=words):
            patched.setattr(recipes, "sizes", "0.5")
            patched.setattr(recipes, name, value)
            recipes.main()


def test_a_run_of_the_recipe_bench_goes_on_where_it_was(dataset, tmp_path, monkeypatch):
    from bench import recipes

    monkeypatch.setattr(recipes, "CONTEXT", 32)
    monkeypatch.setattr(recipes, "WINDOWS", 4)
    size = recipes.Size(64, 1, 2, 1, 1280)
    run = recipes.Run(size, "recipe", recipes.recipe(size))
    kept = tmp_path / "curves"
    bench = recipes.Bench(tmp_path / "out", kept, dataset, 0.5, 1)
    (loss,) = bench.losses([run])
    (path,) = kept.iterdir()
    curve = json.loads(path.read_text(encoding="utf-8"))
    assert curve["tokens"] == [128 * i for i in range(6)] and len(curve["loss"]) == 6
    assert "torch" in curve["machine"] and curve["settings"]["optimizer"] == "muon"
    assert curve["train_tokens"] == TokenData(dataset, "train", 32, 320).tokens
    assert list(tmp_path.glob("out/*/*/metrics.jsonl")) and not list(tmp_path.glob("out/*/*/*.pt"))
    before = path.stat().st_mtime_ns
    assert bench.losses([run]) == [loss] and path.stat().st_mtime_ns == before


def test_a_run_that_fails_or_is_interrupted_leaves_none_behind(dataset, tmp_path, monkeypatch):
    """The other run of two at a time would take minutes; its process is gone at once."""
    from bench import commands, recipes

    processes, real = [], commands.started

    @contextlib.contextmanager
    def noted(*args, **kwargs):
        with real(*args, **kwargs) as process:
            processes.append(process)
            yield process

    monkeypatch.setattr(recipes, "started", noted)
    size = recipes.Size(64, 1, 2, 1, 10**9)
    long, wrong = (recipes.Run(size, "adamw", (("min_lr", n),)) for n in (0.0, -1.0))
    bench = recipes.Bench(tmp_path / "out", tmp_path / "curves", dataset, 1.0, 2)
    with pytest.raises(ValueError, match="train.py .* failed: .*min_lr must be at least 0, not -1"):
        bench.losses([long, wrong])

    def interrupted(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipes.time, "sleep", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.losses([long])
    assert len(processes) == 3 and all(p.poll() is not None for p in processes)
    assert not (tmp_path / "curves").exists()
