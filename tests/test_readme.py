"""The README's commands are run, from a copy of the repository, and its facts are checked."""

import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

READMES = ["README.md", "README.zh.md"]
SHORT = ["--max_iters=2", "--warmup_iters=0", "--eval_iters=1"]


def commands(name):
    """The indented command lines of a README, `&&` taken apart."""
    text = (ROOT / name).read_text(encoding="utf-8")
    lines = re.findall(r"^    ((?:python|pip) .*)$", text, flags=re.M)
    return [shlex.split(part) for line in lines for part in line.split("&&")]


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """The files that git would hand to a new user, without anything made since."""
    folder = tmp_path_factory.mktemp("clone") / "EasyGPT"
    skip = shutil.ignore_patterns(".git", "out*", "__pycache__", ".*_cache", ".hypothesis")
    shutil.copytree(ROOT, folder, ignore=skip)
    for path in (folder / "data").iterdir():
        if path.is_dir():
            shutil.rmtree(path)
    return folder


def run(args, cwd, timeout=120):
    env = {**os.environ, "PYTHONPATH": ""}
    return subprocess.run(
        [sys.executable, *args[1:]],
        cwd=cwd,
        env=env,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        stdin=subprocess.DEVNULL,
    )


def first_command(name):
    """The parts of the quick start: install, prepare, train, sample."""
    install, prepare, train, sample = commands(name)[:4]
    assert install[:3] == ["pip", "install", "-r"]
    assert [c[1] for c in (prepare, train, sample)] == ["data/prepare.py", "train.py", "sample.py"]
    return prepare, train, sample


def test_the_first_command_shortened(clone):
    prepare, train, sample = first_command("README.md")
    for args in (prepare, [*train, *SHORT], [*sample, "--max_new_tokens=5"]):
        result = run(args, clone)
        assert result.returncode == 0, result.stderr
    assert result.stdout and (clone / "out" / "demo" / "loss.png").stat().st_size > 5000


def test_the_sampling_and_evaluation_commands(clone):
    """After the first command there is a checkpoint to sample from and to measure."""
    (clone / "prompt.txt").write_text("Some prompt", encoding="utf-8")
    found = [c for c in commands("README.md") if c[1] == "sample.py" and "--out_dir=out/demo" in c]
    assert len(found) >= 3
    for args in found[1:]:
        result = run([*args, "--max_new_tokens=3"], clone)
        assert result.returncode == 0, result.stderr
    found = [c for c in commands("README.md") if c[1:3] == ["evaluate.py", "--out_dir=out/demo"]]
    assert len(found) == 2
    for args in found:
        result = run(args, clone)
        assert result.returncode == 0, result.stderr
        assert '"bits_per_byte"' in result.stdout


@pytest.mark.slow
def test_the_first_command_whole(clone):
    prepare, train, sample = first_command("README.md")
    for args in (prepare, train, sample):
        result = run(args, clone, timeout=900)
        assert result.returncode == 0, result.stderr
    losses = re.findall(r"val loss ([\d.]+)", run(train, clone, timeout=900).stdout)
    assert float(losses[-1]) <= 1.7


@pytest.mark.parametrize("name", READMES)
def test_what_a_readme_names_exists(name):
    """Every script, config, picture and link, and both READMEs give the same commands."""
    text = (ROOT / name).read_text(encoding="utf-8")
    names = set(re.findall(r"(?:config|assets)/[\w.]+\.\w+", text))
    names |= {c[1] for c in commands(name) if c[0] == "python" and not c[1].startswith("-")}
    names |= {m for m in re.findall(r"\]\(([^)#:]+)\)", text)}
    assert len(names) > 8
    for path in names:
        assert (ROOT / path).is_file(), path
    assert commands(name)[:7] == commands(READMES[0])[:7]
    assert "@" not in text


@pytest.mark.parametrize("name", READMES)
def test_the_file_tree_is_complete(name):
    text = (ROOT / name).read_text(encoding="utf-8")
    listed = re.findall(r"^    ([\w./]+(?:\.py|/)) ", text, flags=re.M)
    here = {p.name for p in ROOT.glob("*.py")} | {f"data/{p.name}" for p in ROOT.glob("data/*.py")}
    assert sorted(listed) == sorted(here | {"config/", "assets/", "docs/", "tests/"})


def test_ci_runs_the_readmes_test_command():
    line = next(
        line
        for line in (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("    pip install -r requirements-dev.txt")
    )
    ci = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert line.strip() in ci.replace("pip install -q", "pip install")


def test_torch_is_pinned_exactly():
    assert "torch==2.13.0" in (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
