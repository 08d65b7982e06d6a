"""The shape of the repository: rooms, the direction of imports, what runs at import, configs."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from configurator import overrides

# From the ground up: a module imports from its own room, or from one that stands before it. What is
# not named here is a script at the top, or in one of the last two rooms.
FLOORS = ("text", "making", "model", "formats", "run", "plan")
SCRIPT_ROOMS = ("bench", "data")
# What a module does not load, by itself or by what it imports.
LIGHT = {"configurator": {"torch", "numpy"}, "model": {"numpy"}, "data.prepare": {"torch"}}
HEAVY = {"wandb", "datasets", "transformers", "matplotlib", "pyarrow", "tokenizers"}
HEAVY |= {"gguf", "huggingface_hub"}


def found_modules():
    """Path of each module by its dotted name, read off the tree."""
    rooms = [p.parent.name for p in ROOT.glob("*/__init__.py") if p.parent.name != "tests"]
    paths = [*ROOT.glob("*.py"), *(p for room in rooms for p in ROOT.glob(f"{room}/*.py"))]
    return {
        ".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p
        for p in paths
    }


MODULES = found_modules()
TREES = {name: ast.parse(p.read_text(encoding="utf-8")) for name, p in MODULES.items()}
ROOMS = sorted({name.split(".")[0] for name in MODULES if "." in name})
SCRIPTS = sorted(
    name
    for name, tree in TREES.items()
    if any(isinstance(n, ast.Call) and ast.unparse(n.func) == "configure" for n in ast.walk(tree))
)


def imports(nodes):
    """Dotted names of all that is imported; `from room import module` names the module."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, "imports name their room"
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                yield whole if whole in MODULES else node.module


ARROWS = {name: set(imports(ast.walk(t))) & set(MODULES) - {name} for name, t in TREES.items()}


def floor(name):
    """How high a module stands."""
    room = name.split(".")[0]
    if name == "configurator":
        return -1
    return FLOORS.index(room) if room in FLOORS else len(FLOORS)


def test_the_rooms_are_those_of_the_picture():
    assert set(ROOMS) == {*FLOORS, *SCRIPT_ROOMS} - {"model"}
    top = {name for name in MODULES if "." not in name} - set(ROOMS)
    assert top == {"train", "sample", "evaluate", "export", "model", "configurator"}
    for room in ROOMS:
        caption = TREES[room].body
        assert len(caption) == 1 and ast.get_docstring(TREES[room]), f"{room}/__init__.py"


@pytest.mark.parametrize("name", MODULES)
def test_no_arrow_points_upward(name):
    up = {other for other in ARROWS[name] if floor(other) > floor(name)}
    assert not up
    if name in SCRIPTS:
        assert not ARROWS[name] & set(SCRIPTS), "scripts never import scripts"
    if name.split(".")[0] in FLOORS:
        assert "configurator" not in ARROWS[name], "only scripts have settings"
    if name.split(".")[0] == "text":
        assert all(other.startswith("text") for other in ARROWS[name])


def test_no_circle():
    waiting = {name: set(others) for name, others in ARROWS.items()}
    while free := [name for name, others in waiting.items() if not others & set(waiting)]:
        for name in free:
            del waiting[name]
    assert not waiting, "modules that import each other"


def test_the_search_sees_arrows():
    """A test that finds nothing passes, too."""
    assert len(MODULES) > 40 and len(SCRIPTS) >= 5
    assert "run.microbatch" in ARROWS["train"] and "making.sampling" in ARROWS["model"]
    assert floor("train") > floor("plan.report") > floor("run.start") > floor("formats.hf")


def loaded(name, seen):
    """All that is imported at a module's start, also by others of ours."""
    for other in set(imports(TREES[name].body)) - seen:
        seen.add(other)
        if other in MODULES:
            loaded(other, seen)
    return {other.split(".")[0] for other in seen}


@pytest.mark.parametrize("name", [n for n in MODULES if not n.startswith("bench")])
def test_nothing_heavy_is_imported_at_start(name):
    assert not loaded(name, set()) & (HEAVY | LIGHT.get(name, set()))


@pytest.mark.parametrize("name", MODULES)
def test_nothing_runs_code_from_data(name):
    """No pickle, no eval or exec, and torch.load only with weights_only."""
    nodes = list(ast.walk(TREES[name]))
    calls = [n for n in nodes if isinstance(n, ast.Call)]
    names = [n.func.id for n in calls if isinstance(n.func, ast.Name)]
    assert not {"eval", "exec", "__import__", "compile"} & set(names)
    dotted = {ast.unparse(n.func): n for n in calls if isinstance(n.func, ast.Attribute)}
    assert not [c for c in dotted if re.match(r"(pickle|marshal|shelve|dill)\.", c)]
    for call, node in dotted.items():
        if call in ("torch.load", "np.load"):
            flags = {k.arg: ast.unparse(k.value) for k in node.keywords}
            assert flags.get("weights_only") == "True", ast.unparse(node)
    assert "time.time" not in dotted, "a clock that people and networks set"
    runs = [c for c in dotted if c.startswith("runpy.")]
    assert runs == (["runpy.run_path"] if name == "configurator" else [])


@pytest.mark.parametrize("name", MODULES)
def test_functions_fit_on_a_screen(name):
    """Main tells a whole run; all others have at most 80 lines."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
    found = [n for n in ast.walk(TREES[name]) if isinstance(n, kinds)]
    long = {n.name: n.end_lineno - n.lineno + 1 for n in found}
    most = {("train", "main"): 200}
    assert not {f: n for f, n in long.items() if n > most.get((name, f), 80)}


def test_train_and_model_are_short():
    lines = {n: len(MODULES[n].read_text(encoding="utf-8").splitlines()) for n in MODULES}
    assert lines["train"] <= 350 and lines["model"] < 400
    main = next(n for n in TREES["train"].body if getattr(n, "name", "") == "main")
    inner = [n for n in ast.walk(main) if n is not main]
    closures = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda | ast.Nonlocal
    assert not [n for n in inner if isinstance(n, closures)], "no closures"


def settings(script):
    """A script's settings, by importing it, which must do nothing."""
    code = (
        "import sys, json; sys.path.insert(0, '.'); import "
        f"{script} as s, configurator; print(json.dumps(configurator.settings_of(vars(s))))"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return json.loads(out.stdout)


@pytest.fixture(scope="module")
def train_settings():
    return settings("train")


@pytest.mark.parametrize("path", sorted((ROOT / "config").glob("*.py")), ids=lambda p: p.name)
def test_every_config_file_loads_and_says_how_it_is_run(path, train_settings):
    values = overrides([str(path)], train_settings)
    assert values
    head = "".join(path.read_text(encoding="utf-8").splitlines(keepends=True)[:6])
    assert f"python train.py config/{path.name}" in head and "loss" in head
    found = {*imports(ast.walk(ast.parse(path.read_text(encoding="utf-8"))))}
    assert not found or (found == {"run.before"} and "trained(" in path.read_text(encoding="utf-8"))
    s = {**train_settings, **values}
    assert s["tokens_per_step"] % (s["batch_size"] * s["max_position_embeddings"]) == 0


def test_the_reference_config_is_the_reference_run(train_settings):
    s = train_settings | overrides([str(ROOT / "config" / "train_gpt.py")], train_settings)
    sizes = dict(num_hidden_layers=24, hidden_size=1024, intermediate_size=2560, head_dim=64)
    sizes |= dict(num_attention_heads=16, num_key_value_heads=4, max_position_embeddings=1024)
    run = dict(tokens_per_step=491520, max_iters=15000, warmup_iters=800, learning_rate=3.2e-4)
    run |= dict(min_lr=3.2e-5, beta1=0.9, beta2=0.95, weight_decay=0.1, grad_clip=1.0)
    run |= dict(rope_theta=10000.0, rms_norm_eps=1e-6, dropout=0.0, dataset="openwebtext")
    assert {k: s[k] for k in sizes | run} == sizes | run
    assert s["lr_decay_iters"] in (0, 15000) and s["vocab_size"] in (0, 50304)
