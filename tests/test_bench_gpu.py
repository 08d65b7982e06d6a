"""bench/gpu.py on toy sizes: steps run, fail and hang, and the report stays whole."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from test_bench import PEER

from bench import gpu_probe, gpu_report, gpu_steps, gpu_training

TRY = ["--device=cpu", "--tiny=True"]
GIB = 2**30


@pytest.fixture
def bench(script, tmp_path):
    """Run it with flags: the script's result and the report's contents."""
    path = tmp_path / "out" / "gpu.json"

    def run(*flags):
        result = script("bench/gpu.py", *TRY, f"--report={path}", *flags)
        return result, json.loads(path.read_text(encoding="utf-8"), parse_constant=pytest.fail)

    return run


def test_the_limits_are_fourteen_minutes_together():
    steps = [step for n, step in enumerate(gpu_steps.STEPS) if n != gpu_steps.OTHERS]
    assert sum(step.seconds for step in steps) <= 840


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps=2,99"], "12 cuDNN, profile"),
        (["--steps=two"], "numbers with commas"),
        (["--device=cpu"], "--device=cpu --tiny=True"),
        (["--device=tpu", "--tiny=True"], "--device=auto"),
    ],
)
def test_a_mistake_is_one_line(script, tmp_path, flags, words):
    result = script("bench/gpu.py", f"--report={tmp_path / 'r.json'}", *flags)
    assert result.code == 1 and words in result.err and result.err.count("\n") == 1, result.err


def test_a_file_that_is_no_report_is_left_alone(script, tmp_path):
    path = tmp_path / "notes.json"
    for text in ("{}x", "[1]", '{"a": 1}'):
        path.write_text(text, encoding="utf-8")
        result = script("bench/gpu.py", *TRY, f"--report={path}")
        assert result.code == 1 and "--report" in result.err and path.read_text() == text


@pytest.mark.slow
def test_steps_are_added_to_the_report_and_the_newest_shown(bench):
    result, rows = bench("--steps=0,9")
    assert result.code == 0 and [r["step"] for r in rows] == [0, 9], result.err
    assert all(r["passed"] and r["card"].startswith("cpu") for r in rows)
    assert rows[0]["figures"]["tflops"] > 0 and rows[0]["torch"] == torch.__version__
    again, rows = bench("--steps=9")
    assert [r["step"] for r in rows] == [0, 9, 9]
    lines = [line for line in again.out.splitlines() if line.startswith("| ")]
    assert [line.split(" | ")[0] for line in lines] == ["| step", "| 0", "| 9"]
    assert f"{rows[-1]['seconds']:.0f} |" in lines[-1]


@pytest.mark.slow
def test_a_step_that_hangs_or_fails_stops_no_other(bench, monkeypatch):
    quick = [gpu_steps.Step("a", 0, print), gpu_steps.Step("b", 0, print)]
    monkeypatch.setattr(gpu_steps, "STEPS", quick)
    result, rows = bench()
    assert result.code == 1 and result.err.count("\n") == 1 and "0 a, 1 b" in result.err
    assert [r["note"] for r in rows] == ["timed out after 0 s"] * 2
    monkeypatch.undo()
    monkeypatch.setattr(gpu_training, "write_tokens", lambda *_: None)
    result, rows = bench("--steps=5")
    assert result.code == 1 and "5 uncompiled" in result.err
    assert rows[-1]["passed"] is False and "data" in rows[-1]["note"], rows[-1]
    assert "data" in result.out and "Traceback" not in result.out


@pytest.mark.slow
def test_all_steps_pass_on_toy_sizes(bench):
    result, rows = bench()
    assert result.code == 0, result.out + result.err
    assert sorted(r["step"] for r in rows) == list(range(gpu_steps.OTHERS))
    assert all(r["passed"] for r in rows)
    found = {r["step"]: r["figures"] for r in rows}
    assert len(found[12]["kernels_ms_calls"]) == 15 and found[2]["planned"] > 0
    assert len([line for line in result.out.splitlines() if line.startswith("| ")]) == 14


@pytest.mark.slow
def test_other_projects_models_stand_beside_ours(bench, tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "toy").mkdir()
    (tmp_path / "toy" / "model.py").write_text(PEER, encoding="utf-8")
    result, rows = bench(f"--peer={tmp_path / 'toy' / 'model.py'}", "--steps=13")
    assert result.code == 0, result.err
    speeds = [k for k in rows[0]["figures"] if k.endswith("_tokens_per_s")]
    assert speeds == ["ours_tokens_per_s", "transformers_tokens_per_s", "toy_tokens_per_s"]


def training(**changed):
    f = {"first_loss": 10.9, "last_loss": 9.0, "uniform_loss": math.log(50257), "updates": 30}
    return f | {"compile": "True", "recompiles": 0, "lines": ["compile  took 40 s"]} | changed


@pytest.mark.parametrize(
    ("changed", "missed"),
    [
        ({}, []),
        ({"last_loss": 11.0}, ["falling"]),
        ({"last_loss": 11.0, "updates": 3}, []),
        ({"first_loss": 12.0}, ["first loss about 10.8"]),
        ({"recompiles": 1}, ["no recompile"]),
        ({"lines": ["compile  failed, training uncompiled"]}, ["torch.compile works"]),
        ({"lines": [], "compile": "False"}, []),
    ],
)
def test_what_must_hold_for_training(changed, missed):
    checks = gpu_training.training_checks(training(**changed))
    assert [name for name, holds in checks.items() if not holds] == missed


def test_the_peak_is_compared_with_the_plan():
    assert gpu_training.peak_check(None, 100.0, 0.07) == {}
    ratios = (0.92, 0.94, 1.06, 1.08)
    holds = [[*gpu_training.peak_check(int(r * GIB), GIB, 0.07).values()] for r in ratios]
    assert holds == [[False], [True], [True], [False]]


@pytest.mark.parametrize(
    ("found", "passed"),
    [
        ({"note": "", "checks": {"a": True}}, (True, "")),
        ({"note": "", "checks": {"a": True, "b": False}}, (False, "b")),
        ({"note": "timed out after 9 s", "checks": {"a": True}}, (False, "timed out after 9 s")),
        ({"note": "", "checks": {}}, (None, "")),
    ],
)
def test_judging(found, passed):
    assert gpu_report.judge(found) == passed


@pytest.fixture
def card(monkeypatch):
    """A GPU of 16 GiB that is not there; what it is told to do is in its list."""
    told = []
    answers = {
        "mem_get_info": (5 * GIB, 16 * GIB),
        "max_memory_allocated": 8 * GIB,
        "max_memory_reserved": 10 * GIB,
        "memory_reserved": 9 * GIB,
        "get_device_properties": SimpleNamespace(total_memory=16 * GIB),
    }
    for name, answer in answers.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, answer=answer: answer)
    for owner, name in (
        (torch.cuda, "reset_peak_memory_stats"),
        (torch.cuda, "set_per_process_memory_fraction"),
        (torch.accelerator, "synchronize"),
    ):
        monkeypatch.setattr(owner, name, lambda *args, name=name: told.append((name, *args)))
    return told


def test_memory_of_a_gpu(card):
    where = torch.device("cuda")
    sizes = {"peak": 8 * GIB, "gaps": 2 * GIB, "context": 2 * GIB}
    assert gpu_probe.memory_figures(where) == sizes and card == []
    assert gpu_probe.memory_figures(where, reset=True) == sizes
    gpu_probe.synchronise(where)
    with gpu_probe.shortage(where):
        pass
    assert card == [
        ("reset_peak_memory_stats", where),
        ("synchronize", where),
        ("set_per_process_memory_fraction", 9 / 16),  # of the selected device
    ]


def test_seconds_of_a_gpu_are_those_between_two_events(card, monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            card.append(("record", self))

        def elapsed_time(self, end):
            assert [*card[1::2], card[2]] == [("record", self), ("record", end), "work"]
            return 250.0  # milliseconds

    monkeypatch.setattr(torch.cuda, "Event", Event)
    assert gpu_probe.seconds(torch.device("cuda"), lambda: card.append("work")) == 0.25
    assert [told[0] for told in card] == ["synchronize", "record", "w", "record", "synchronize"]


def test_planned_and_measured_memory_stand_side_by_side():
    sizes = {"context": 0.4 * GIB, "gaps": 0.3 * GIB}
    reference = {"planned": 12 * GIB, "peak": 12.6 * GIB, "batch_size": 12, **sizes}
    decoding = {"planned": GIB, "eager_peak": 1.1 * GIB, "eager_context": GIB, "eager_gaps": 0}
    rows = {2: {"name": "reference", "figures": reference}, 5: {"name": "x", "figures": {}}}
    rows[8] = {"name": "decoding", "figures": decoding}
    lines = list(gpu_report.memory_table(rows))
    assert lines[2] == "| reference | 12 | 12.000 | 12.600 | 1.050 | 0.400 | 0.300 |"
    assert lines[3] == "| decoding | 1 | 1.000 | 1.100 | 1.100 | 1.000 | 0.000 |"
    assert "at most 1.00 GiB" in lines[-1] and len(lines) == 5
    assert list(gpu_report.memory_table({2: {"name": "r", "figures": {"planned": 1}}})) == []


ROW = {"step": 2, "name": "a", "card": "x", "tiny": True, "torch": "2", "seconds": 1.5}
ROW |= {"passed": None, "missed": "", "facts": [], "checks": {}, "figures": {}}


@pytest.mark.parametrize("key", sorted(ROW))
def test_a_row_of_a_report_that_lacks_something_is_told(tmp_path, key):
    path = tmp_path / "r.json"
    bad = {k: v for k, v in ROW.items() if k != key}
    for row in ({**bad, key: {1: 2}} if key not in ("checks", "figures") else bad, bad):
        if key == "passed" and row is bad:
            continue  # null says that a step was skipped
        path.write_text(json.dumps([ROW, row]), encoding="utf-8")
        with pytest.raises(ValueError, match=f"result 2 has no {key}.*choose another --report"):
            gpu_report.read_report(path)
    path.write_text(json.dumps([ROW]), encoding="utf-8")
    assert gpu_report.read_report(path) == [ROW]
