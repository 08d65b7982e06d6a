"""The shape of the repository: who imports whom, and which config files load."""

import ast
import json
import re
import subprocess
import sys

import pytest
from conftest import ROOT

from configurator import overrides

ALLOWED = {  # scripts never import scripts; what reads and writes models may import leaves
    "configurator": set(),
    "sampling": set(),
    "quantization": {"sampling"},
    "model": {"sampling"},
    "dataloader": set(),
    "runtime": set(),
    "tokenizer": set(),
    "runlog": set(),
    "checkpoint": {"model", "sharded"},
    "sharded": {"checkpoint"},
    "distributed": set(),
    "hf": {"model", "tokenizer"},
    "gguf_writer": {"hf", "model"},
    "pretrained": {"checkpoint", "hf", "model", "tokenizer"},
    "scoring": {"model", "tokenizer"},
    "memory": {"model", "runtime"},
    "planner": {"dataloader", "memory", "model", "runtime"},
    "train": {
        *("checkpoint", "configurator", "dataloader", "distributed", "model", "planner"),
        *("pretrained", "runlog", "runtime", "sharded", "tokenizer"),
    },
    "sample": {
        *("configurator", "model", "pretrained", "quantization", "runtime", "sampling"),
        "tokenizer",
    },
    "export": {
        *("checkpoint", "configurator", "gguf_writer", "hf", "model", "pretrained", "runlog"),
        *("runtime", "tokenizer"),
    },
    "evaluate": {
        *("configurator", "dataloader", "model", "pretrained", "runlog", "runtime", "scoring"),
        "tokenizer",
    },
    "bench": {
        *("bench_gpu", "configurator", "dataloader", "gguf_writer", "hf", "model"),
        *("quantization", "runtime", "sampling", "tokenizer"),
    },
    "bench_gpu": {  # what it measures is train.py itself
        *("bench", "checkpoint", "configurator", "dataloader", "memory", "model", "planner"),
        *("runlog", "runtime", "sampling", "scoring", "train"),
    },
    "data/prepare": {"configurator", "tokenizer"},
}
PROJECT = {name.split("/")[-1] for name in ALLOWED}
LIGHT = {
    "configurator": {"torch", "numpy"},
    "tokenizer": {"torch"},
    "model": {"numpy"},
    "sampling": {"numpy"},
}
HEAVY = {"wandb", "datasets", "transformers", "matplotlib", "pyarrow", "tokenizers"}
HEAVY |= {"gguf", "huggingface_hub"}


def tree(name):
    return ast.parse((ROOT / f"{name}.py").read_text(encoding="utf-8"))


def imported(nodes):
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("name", ALLOWED)
def test_import_arrows(name):
    assert set(imported(ast.walk(tree(name)))) & PROJECT <= ALLOWED[name]


@pytest.mark.parametrize("name", ALLOWED)
def test_nothing_heavy_is_imported_at_start(name):
    at_start = set(imported(tree(name).body))
    assert not at_start & (HEAVY | LIGHT.get(name, set()))


@pytest.mark.parametrize("name", ALLOWED)
def test_nothing_runs_code_from_data(name):
    """No pickle, no eval or exec, and torch.load only with weights_only."""
    nodes = list(ast.walk(tree(name)))
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
    assert not list(imported(ast.walk(ast.parse(path.read_text(encoding="utf-8")))))
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


@pytest.mark.parametrize("script", ["train", "sample", "export", "evaluate"])
def test_help_shows_every_setting_with_its_comment(script):
    out = subprocess.run(
        [sys.executable, f"{script}.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert out.returncode == 0 and out.stderr == ""
    for name, value in settings(script).items():
        assert f"--{name}={value!r}" in out.stdout
    assert "folder" in out.stdout
