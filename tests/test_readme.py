"""The pages' commands are run, from a copy of the repository, and what they name is looked for."""

import ast
import os
import re
import shlex
import shutil
import subprocess
import sys

import pytest
from conftest import ROOT

READMES = ["README.md", "README.zh.md"]
DOCS = sorted(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))
PAGES = [*READMES, *DOCS, "CONTRIBUTING.md", "SECURITY.md", "assets/gpu/README.md"]
MOST_BYTES = 10_240  # of a README
SHORT = ["--max_iters=2", "--eval_windows=4"]
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FOLDERS = {"config", "assets", "docs", "tests"}
# Files that a page speaks of and that are not this repository's.
FOREIGN_FILES = {"FILE.py", "my_datatrove.py", "convert_hf_to_gguf.py", "__init__.py"}
# Flags that belong to pip, uv, torchrun, SLURM, vLLM's and other programs.
FOREIGN_FLAGS = {"torch-backend", "signals-to-handle", "max-restarts", "help"}


def text_of(name):
    return (ROOT / name).read_text(encoding="utf-8")


def code_of(name):
    """Indented lines and what stands between backticks; a line that ends in a backslash goes on."""
    text = text_of(name).replace("\\\n", " ")
    return re.findall(r"^    (.*)$", text, flags=re.M) + re.findall(r"`([^`\n]+)`", text)


def commands(name):
    """The indented command lines of a page, `&&` taken apart."""
    lines = re.findall(r"^    ((?:python|pip) .*)$", text_of(name), flags=re.M)
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


@pytest.fixture(scope="module")
def trained(clone):
    """The clone after the first command, shortened; what the parts printed."""
    prepare, train, sample = first_command("README.md")
    printed = []
    for args in (prepare, [*train, *SHORT], [*sample, "--max_new_tokens=5"]):
        result = run(args, clone)
        assert result.returncode == 0, result.stderr
        printed.append(result.stdout)
    return clone, printed


def test_the_first_command_shortened(trained):
    clone, printed = trained
    assert printed[-1] and (clone / "out" / "demo" / "loss.png").stat().st_size > 5000


def test_the_sampling_commands(trained):
    clone, _ = trained
    (clone / "prompt.txt").write_text("Some prompt", encoding="utf-8")
    found = [c for c in commands("docs/sampling.md") if "--out_dir=out/demo" in c]
    assert len(found) >= 3 and {c[1] for c in found} == {"sample.py"}
    for args in found:
        result = run([*args, "--max_new_tokens=3"], clone)
        assert result.returncode == 0, result.stderr


def test_the_evaluation_commands(trained):
    clone, _ = trained
    found = [
        c for c in commands("docs/evaluation.md") if c[1:3] == ["evaluate.py", "--out_dir=out/demo"]
    ]
    assert len(found) == 2
    for args in found:
        result = run(args, clone)
        assert result.returncode == 0, result.stderr
        assert '"bits_per_byte"' in result.stdout


@pytest.mark.slow  # tests/test_export.py runs the like
def test_the_export_commands(trained):
    clone, _ = trained
    found = [c for c in commands("docs/export.md") if c[1:3] == ["export.py", "--out_dir=out/demo"]]
    assert len(found) == 3
    for args in found:
        result = run(args, clone)
        assert result.returncode == 0, result.stderr


def test_the_lines_of_python(trained):
    """docs/sampling.md makes text without sample.py."""
    clone, _ = trained
    lines = re.search(r"^    import torch\n(?:(?:    .*)?\n)*", text_of("docs/sampling.md"), re.M)
    result = run(["python", "-c", re.sub("^    ", "", lines[0], flags=re.M)], clone)
    assert result.returncode == 0 and result.stdout, result.stderr


@pytest.mark.slow
def test_the_first_command_whole(clone):
    prepare, train, sample = first_command("README.md")
    for args in (prepare, train, sample):
        result = run(args, clone, timeout=900)
        assert result.returncode == 0, result.stderr
    losses = re.findall(r"val loss ([\d.]+)", run(train, clone, timeout=900).stdout)
    assert float(losses[-1]) <= 1.7


@pytest.mark.parametrize("name", READMES)
def test_a_readme_is_a_first_page(name):
    """It is short, and both give the same commands and lead to the same pages."""
    text = text_of(name)
    assert len(text.encode()) <= MOST_BYTES
    assert len(commands(name)) > 12 and commands(name) == commands(READMES[0])
    assert "@" not in text
    links = set(re.findall(r"\]\(([^)#:]+)", text)) - set(READMES)
    assert {*DOCS} - {"docs/zh.md"} <= links


@pytest.mark.parametrize("name", READMES)
def test_the_map_is_complete(name):
    """Each script at the top and each room, and nothing else; what the table below it opens."""
    text = text_of(name)
    listed = re.findall(r"^    ([\w./]+(?:\.py|/)) ", text, flags=re.M)
    here = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{room}/" for room in [*ROOMS, *FOLDERS]} - {"tests/gpu/"}
    assert sorted(listed) == sorted(here | folders)
    opened = {"run/optim.py", "data/readers.py", "formats/gguf.py", "run/cards.py", "run/stop.py"}
    assert {f"`{path}`" for path in opened} <= set(re.findall(r"`[^`\n]+`", text))


@pytest.mark.parametrize("room", ROOMS)
def test_the_first_line_of_a_file_says_what_it_holds(room):
    """As the READMEs promise, instead of a list of all files."""
    for path in ROOT.glob(f"{room}/*.py"):
        assert text_of(path).startswith('"""') and ast.get_docstring(ast.parse(text_of(path)))


@pytest.mark.parametrize("name", PAGES)
def test_what_a_page_names_exists(name):
    """Every script, module, config, picture, curve and page."""
    text, code = text_of(name), "\n".join(code_of(name))
    inside = "|".join([*ROOMS, *FOLDERS])
    kinds = r"(?:py|md|png|jsonl)"
    names = set(re.findall(rf"(?<![\w/.])(?:{inside})/[\w/]+\.{kinds}\b", text))
    names |= set(re.findall(r"(?<![\w/.<>*-])\w+\.py\b", code)) - FOREIGN_FILES
    assert not {path for path in names if not (ROOT / path).is_file()}


@pytest.mark.parametrize("name", PAGES)
def test_links_lead_somewhere(name):
    """To a file, and to a heading where one is named, from the page's own folder."""
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(name)):
        if re.match("https?:", target):
            continue
        path, _, heading = target.partition("#")
        file = ((ROOT / name).parent / path).resolve() if path else ROOT / name
        assert file.is_file(), f"{name}: {target}"
        headings = (
            re.findall(r"^#+ (.*)$", file.read_text(encoding="utf-8"), re.M) if heading else []
        )
        slugs = {
            re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in headings
        }
        assert not heading or heading in slugs, f"{name}: {target}"


def settings_of(script):
    """The names of a script's settings, read off its source."""
    tree = ast.parse(text_of(script))
    targets = [n.targets[0] for n in tree.body if isinstance(n, ast.Assign)]
    return {t.id for t in targets if isinstance(t, ast.Name) and t.id == t.id.lower()}


SCRIPTS = ["train.py", "sample.py", "evaluate.py", "export.py", "data/prepare.py"]
SCRIPTS += sorted(f"bench/{path.name}" for path in ROOT.glob("bench/*.py"))


@pytest.mark.parametrize("name", PAGES)
def test_every_setting_of_a_command_is_there(name):
    """`python X.py CONFIG --name=value` and torchrun's: the config and each name."""
    known = set().union(*map(settings_of, SCRIPTS)) | FOREIGN_FLAGS
    for line in code_of(name):
        for flag in re.findall(r"^--(\w[\w-]*)", line):
            assert flag in known, f"{name}: {line}"
        for script, rest in re.findall(r"(?<![\w/.])([\w/]+\.py)((?:,? [^\s&]+)*)", line):
            if script in SCRIPTS:
                words = [word.strip(",]") for word in rest.split()]
                flags = {re.match(r"--([\w-]+)", w)[1] for w in words if w.startswith("--")}
                assert flags <= settings_of(script) | {"help"}, f"{name}: {line}"
                configs = {w for w in words if w.endswith(".py") and "=" not in w} - FOREIGN_FILES
                assert all((ROOT / config).is_file() for config in configs), f"{name}: {line}"


def test_the_search_sees_settings():
    """A test that finds nothing passes, too."""
    assert {"tokens_per_step", "sample_prompt", "reference"} <= settings_of("train.py")
    assert "separator" in settings_of("data/prepare.py") and "peer" in settings_of("bench/train.py")
    assert "train.py config/train_gpt.py" in " ".join(code_of("docs/cluster.md"))


def test_ci_runs_the_readmes_test_command():
    line = next(
        line
        for line in text_of("README.md").splitlines()
        if line.startswith("    pip install -r requirements-dev.txt")
    )
    ci = text_of(".ci/run")
    assert line.strip() in ci.replace("pip install -q", "pip install")


def test_torch_is_pinned_exactly():
    assert "torch==2.13.0" in text_of("requirements.txt").splitlines()
