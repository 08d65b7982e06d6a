"""A GPU in at most fourteen minutes: python bench/gpu.py [--steps=2,8]

All that is planned, promised or assumed about a GPU: speed, memory against the
plan, running out of memory, resuming, decoding and more. A step that fails or
hangs stops no other. Results go to a JSON report, step by step, and into two
tables at the end; please send both. --peer=PATH/model.py adds a step that
trains beside other projects' models, three minutes more. --device=cpu
--tiny=True tries the bench itself where there is no GPU.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import contextlib
import datetime
import json
import os
import subprocess
import tempfile
import time

import torch

from bench import gpu_steps, gpu_training
from bench.commands import started
from bench.gpu_probe import MARK, Setup
from bench.gpu_report import Result, judge, memory_table, newest, read_report, table
from bench.settings import peers
from configurator import configure
from run import script
from run.settings import check_way
from text import files

steps = ""  # which steps to run, as 2,8; empty = all
peer = ""  # litgpt, or other model.py files, with commas between, as in bench/train.py
report = "out/gpu.json"  # the file that results are added to
device = "auto"  # auto, cuda, cuda:1; cpu with tiny
tiny = False  # toy sizes, to try the bench itself, be it on a CPU


def chosen_steps(text: str, beside: bool) -> list[int]:
    """The steps of 2,8, all for "", the tests last. Raises ValueError for others.

    beside: "" has the one beside others, too.
    """
    there = range(len(gpu_steps.STEPS))
    usual = [n for n in there if beside or n != gpu_steps.OTHERS]
    names = text.replace(" ", "").split(",") if text.strip() else map(str, usual)
    numbers = {int(n) if n.isdecimal() else -1 for n in names}
    if not numbers <= set(there):
        known = ", ".join(f"{i} {s.name}" for i, s in enumerate(gpu_steps.STEPS))
        raise ValueError(f"steps must be numbers with commas between, not {text!r}: {known}")
    return sorted(numbers, key=lambda n: (n == gpu_steps.TESTS, n))


def chosen_device(device: str, tiny: bool) -> str:
    """auto is cuda, or cpu with tiny. Raises ValueError when there is nothing to measure."""
    there = torch.cuda.is_available()
    name = ("cuda" if there else "cpu") if device == "auto" else device
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not there):
        raise ValueError(f"device={device!r}, but there is no such GPU; write --device=auto")
    if kind == "cpu" and not tiny:
        raise ValueError(
            f"device={device!r} is no GPU here, and a CPU would take days; to try the bench itself "
            "write --device=cpu --tiny=True"
        )
    return name


def environment_of(number: int, folder: str) -> dict[str, str]:
    """Ours, in which importing train.py has set what counts before torch is loaded, and more.

    Attention is the one that consumer cards have, but in one step.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONIOENCODING": "utf-8"}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(Path(folder, "inductor"))
    environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"] = "1"
    if number == gpu_steps.CUDNN:
        del environment["TORCH_CUDNN_SDPA_DEPRIORITIZED"]
    return environment


def run_step(number: int, setup: Setup) -> Result:
    """What a step found, as far as it came; "note" says why it came no further, or is ""."""
    command = ["-m", "bench.gpu_steps", str(number), json.dumps(setup._asdict())]
    environment = environment_of(number, setup.folder)
    out, err = (Path(setup.folder, f"{number}.{name}") for name in ("out", "err"))
    found: Result = {"facts": [], "checks": {}, "figures": {}, "note": ""}
    with (
        out.open("wb") as stdout,
        err.open("wb") as stderr,
        started(command, environment, stdout=stdout, stderr=stderr) as process,
    ):
        try:
            if code := process.wait(setup.seconds):
                found["note"] = f"exit code {code}"
        except subprocess.TimeoutExpired:
            found["note"] = f"timed out after {setup.seconds:.0f} s"
    said = err.read_text(encoding="utf-8", errors="replace").strip().splitlines()
    if found["note"].startswith("exit") and said:
        found["note"] = said[-1][:300]
    if found["note"]:
        found["said"] = said[-20:]
    for line in out.read_text(encoding="utf-8", errors="replace").splitlines():
        if line.startswith(MARK):
            with contextlib.suppress(ValueError):  # cut short; NaN, which is not JSON, is a text
                told = json.loads(line.removeprefix(MARK), parse_constant=str)
                found["facts"] += told["facts"]
                found["checks"] |= told["checks"]
                found["figures"] |= told["figures"]
    return found


def result_of(number: int, setup: Setup, card: str) -> Result:
    """Run a step: its row of the report. card: where the step does not name it."""
    step, t0 = gpu_steps.STEPS[number], time.monotonic()
    found = run_step(number, setup)
    took = round(time.monotonic() - t0, 1)
    passed, missed = judge(found)
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    row = {"step": number, "name": step.name, "card": found["figures"].get("card", card)}
    row |= {"tiny": setup.tiny, "date": now, "torch": torch.__version__, "seconds": took}
    return row | {"passed": passed, "missed": missed} | found


def line_of(row: Result) -> str:
    """A result for people."""
    passed = {True: "passed", False: f"NOT PASSED ({row['missed']})", None: "skipped"}
    words, facts = passed[row["passed"]], "; ".join(row["facts"])
    return f"{row['step']:>2} {row['name']}, {row['seconds']:.0f} s: {words}: {facts}"


def run(folder: Path, numbers: list[int], path: Path, device: str, tiny: bool, peer: str) -> None:
    """Run steps, print each result when it is known, and then tables; raises ValueError at last.

    A step may also take the time that those before it and those not asked for leave.
    """
    results = read_report(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, json.dumps(results, indent=1))  # what cannot be written fails now
    vocabulary = gpu_training.TINY_VOCABULARY if tiny else gpu_training.VOCABULARY
    gpu_training.write_tokens(folder / "data", vocabulary)
    limits = [step.seconds for step in gpu_steps.STEPS]
    left, card, failed = float(sum(limits)), "unknown", []
    if gpu_steps.OTHERS not in numbers:
        left -= limits[gpu_steps.OTHERS]
    try:
        for i, number in enumerate(numbers):
            later = sum(limits[n] for n in numbers[i + 1 :])
            setup = Setup(str(folder), str(path), device, tiny, left - later, peer)
            row = result_of(number, setup, card)
            left -= min(row["seconds"], setup.seconds)
            card = row["card"]
            results.append(row)
            files.write(path, json.dumps(results, indent=1))
            print(line_of(row), flush=True)
            failed += [f"{number} {row['name']}"] * (row["passed"] is False)
    finally:
        shown = newest(results, card, tiny)
        if shown:
            print("\n".join(["", *table(shown), "", *memory_table(shown)]), flush=True)
    if failed:
        raise ValueError(f"not passed: {', '.join(failed)}; the figures are in {path}")


def main() -> None:
    beside = ",".join(peers(peer))
    numbers, chosen = chosen_steps(steps, bool(beside)), chosen_device(device, tiny)
    path = files.path_of(report).resolve()
    check_way(f"report={report}", path.parent)
    with tempfile.TemporaryDirectory() as folder:
        run(Path(folder), numbers, path, chosen, tiny, beside)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
