"""Two processes against one: python bench/ranks.py

train.py makes the same updates of the same tokens with two ranks, a core each,
and with one rank on one core: tokens/s.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import os
import tempfile
from dataclasses import asdict
from functools import partial

import numpy as np

from bench.commands import run
from bench.models import Shape
from bench.rounds import in_turn, median, ratio
from bench.settings import check
from configurator import configure
from run import script
from run.records import read_records

# what
dtype = "float32"  # or bfloat16, by autocast
layers = 6  # blocks of the model
hidden = 384  # a multiple of 64
batch = 4  # windows in a micro-step; an update has four
context = 256  # tokens in a window
# how
repeats = 3  # runs of five updates of each

ONE, TWO = "one rank", "two ranks"


def write_tokens(folder: Path) -> None:
    """train.bin and val.bin of random tokens."""
    for split in ("train", "val"):
        ids = np.random.default_rng(0).integers(0, 50000, 100_000)
        ids.astype("<u2").tofile(folder / f"{split}.bin")


def train(ranks: int, flags: list[str], out: Path) -> float:
    """Tokens/s of so many ranks together, a thread each, without the first update."""
    start = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    command = [*(start if ranks > 1 else []), "train.py", *flags, f"--out_dir={out}"]
    run(command, environment={**os.environ, "OMP_NUM_THREADS": "1"})
    found = [r["tokens_per_s"] for r in read_records(out / "metrics.jsonl") if "loss" in r]
    return median(found[1:])


def main() -> None:
    shape = Shape(layers, hidden, batch, context)
    check(dtype=dtype, repeats=repeats, **shape._asdict())
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokens(folder)
        flags = [f"--{name}={value}" for name, value in asdict(shape.config).items()]
        flags += [f"--dataset={folder}", f"--batch_size={batch}", f"--dtype={dtype}"]
        flags += [f"--tokens_per_step={4 * shape.tokens}", "--compile=False", "--device=cpu"]
        flags += ["--max_iters=5", "--warmup_iters=1", f"--eval_windows={batch}"]
        flags += ["--log_interval=1", "--overwrite=True"]
        ways = {ONE: partial(train, 1, flags, folder / "one")}
        ways |= {TWO: partial(train, 2, flags, folder / "two")}
        speeds: dict[str, list[float]] = {name: [] for name in ways}
        try:
            for turn, name, speed in in_turn(ways, repeats):
                speeds[name].append(speed)
                print(f"{turn}  {name}: {speed:,.0f} tokens/s", flush=True)
        finally:
            if speeds[TWO]:
                times = ratio(speeds[TWO], speeds[ONE])
                print(f"two ranks have {times:.2f} times the speed of one")


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
