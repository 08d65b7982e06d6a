"""A few damaged inputs of every kind of file that a stranger makes; tests/fuzz.py tries more."""

import json

import fuzz
import hypothesis
import pytest
from hypothesis import HealthCheck, Phase, given

QUICK = hypothesis.settings(
    max_examples=20,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=list(HealthCheck),
)
SLOW = {"picture": 2, "checkpoint": 10, "hf": 10}  # examples


@pytest.mark.parametrize("name", fuzz.TARGETS)
def test_damage_is_one_line_that_names_the_file(name):
    target = fuzz.TARGETS[name]

    @hypothesis.settings(QUICK, max_examples=SLOW.get(name, QUICK.max_examples))
    @given(fuzz.inputs(target))
    def one(files):
        with fuzz.workplace() as folder:
            found = fuzz.tried(target, files, folder)
            assert not found.problem, found.problem

    one()


def seeds(name, **changed):
    """The first valid folder of a target with other files in it."""
    [files, *_] = fuzz.TARGETS[name].seeds()
    return files | changed


METRICS = {
    "no object": b"5\n",
    "no iter": b'{"val_loss": 1, "tokens": 1}\n',
    "iter that is null": b'{"iter": null, "val_loss": 1, "tokens": 1}\n',
    "a text for a number": b'{"iter": "a", "val_loss": "b", "tokens": 1}\n',
    "deep": b"[" * 100_000,
    "not UTF-8": b"\xff\n",
}
PINNED = [
    *(("metrics", {"metrics.jsonl": data}) for data in METRICS.values()),
    ("lock", {".lock": b"pid \xa8"}),
    ("report", {"gpu.json": b"[" * 100_000}),
    ("report", {"gpu.json": b"5"}),
    ("tokens", {"meta.json": json.dumps(fuzz.META | {"tokenizer": None, "splits": {}}).encode()}),
    ("tokens", {"meta.json": json.dumps(fuzz.META | {"splits": {"train": 5}}).encode()}),
    ("tokens", {"meta.json": json.dumps(fuzz.META | {"tokenizer": "", "splits": {}}).encode()}),
    ("verify", {"meta.json": b"[" * 100_000}),
    ("verify", {"train.bin": b""}),
]


@pytest.mark.parametrize("name, changed", PINNED)
def test_what_once_failed(tmp_path, name, changed):
    target = fuzz.TARGETS[name]
    found = fuzz.tried(target, seeds(name, **changed), tmp_path)
    assert not found.problem, found.problem


def test_a_task_number_out_of_a_file_takes_no_time(tmp_path):
    """datatrove's world_size, and the number of parts, are looked for, not counted up to."""
    files = fuzz.token_folders()[3]
    files["train/logs/executor.json"] = b'{"world_size": 100000000000}'
    found = fuzz.tried(fuzz.TARGETS["tokens"], files, tmp_path)
    assert found.refused and not found.problem and found.seconds < 5
