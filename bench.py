"""Measure the project on this machine: python bench.py --what=save

Timings are noisy, so variants are run in turn, A B A B, and medians and ratios are printed.

save: the demo's training with a checkpoint every 25 updates against the same without.
"""

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import runtime
from configurator import configure

what = "save"  # what to measure; see above
repeats = 3  # times each variant is run
steps = 400  # updates of a run

ROOT = Path(__file__).resolve().parent


def train_seconds(flags: list[str]) -> float:
    """Wall-clock seconds of a demo training between its first and last logged update."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "out"
        fixed = [
            f"--out_dir={out}",
            f"--max_iters={steps}",
            "--warmup_iters=10",
            "--log_interval=1",
        ]
        fixed += ["--eval_iters=1", "--eval_interval=1000000"]
        command = [sys.executable, "train.py", "config/train_demo.py", *fixed, *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, encoding="utf-8")
        if done.returncode:
            raise ValueError(f"train.py failed: {done.stderr.strip()}")
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [r for r in map(json.loads, lines) if "loss" in r]
        seconds: float = records[-1]["elapsed_s"] - records[20]["elapsed_s"]
        return seconds


def bench_save() -> None:
    """What writing a checkpoint every 25 updates costs a training run on the demo's config."""
    every: list[float] = []
    never: list[float] = []
    for _ in range(repeats):
        never.append(train_seconds([]))
        every.append(train_seconds(["--checkpoint_interval=25"]))
        print(f"without {never[-1]:.2f} s, with {every[-1]:.2f} s", flush=True)
    ratio = statistics.median(b / a for a, b in zip(never, every, strict=True))
    print(f"save every 25 updates: {ratio - 1:+.2%} of the run's time (median of {repeats})")


def main() -> None:
    if what != "save":
        raise ValueError(f"what must be save, not {what!r}")
    if repeats < 1 or steps < 50:
        raise ValueError("repeats must be at least 1 and steps at least 50")
    bench_save()


if __name__ == "__main__":
    globals().update(configure(globals()))
    runtime.run(main)
