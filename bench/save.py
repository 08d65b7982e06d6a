"""What a checkpoint costs a run: python bench/save.py [--updates=600]

Runs of the demo's config on the embedded corpus save every 25 updates. Of each
25 the first 12, with the save and its writing, are compared with the next 12.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import statistics
import tempfile

from bench.commands import run
from bench.settings import check
from configurator import configure, settings_of
from run import script
from run.records import read_records
from run.settings import at_least

updates = 600  # of a run, at least 100
repeats = 3  # runs

EVERY, HALF = 25, 12  # updates between saves; those that are compared


def costs_of(ends: list[float]) -> list[float]:
    """What each save takes of the time between two, of the seconds at which updates ended."""
    costs = []
    for k in range(EVERY, len(ends) - EVERY + 1, EVERY):
        before, middle, after = ends[k - 1], ends[k + HALF - 1], ends[k + 2 * HALF - 1]
        costs.append(((middle - before) - (after - middle)) / (ends[k + EVERY - 1] - before))
    return costs


def main() -> None:
    check(repeats=repeats)
    at_least(settings_of(globals()), updates=100)
    costs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        data, out = Path(folder, "data"), Path(folder, "out")
        run(["data/prepare.py", "--source=stdlib", f"--dataset={data}"])
        command = ["train.py", "config/train_demo.py", f"--dataset={data}", f"--out_dir={out}"]
        command += [f"--max_iters={updates}", f"--checkpoint_interval={EVERY}", "--log_interval=1"]
        command += ["--warmup_iters=10", "--eval_windows=4", "--eval_interval=1000000"]
        try:
            for i in range(repeats):
                run(command)
                records = read_records(out / "metrics.jsonl")
                ends = [r["elapsed_s"] for r in records if "loss" in r]
                found = costs_of(ends)
                print(f"{i + 1}/{repeats}  {len(found)} saves, {ends[-1]:.1f} s: ", end="")
                print(f"each costs {statistics.median(found):+.2%}", flush=True)
                costs += found
        finally:
            if len(costs) > 1:
                low, middle, high = (f"{q:+.2%}" for q in statistics.quantiles(costs, n=4))
                print(
                    f"a save every {EVERY} updates costs {middle} of the time (median of "
                    f"{len(costs)} saves; quartiles {low}, {high})"
                )


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
