"""What reading a batch costs: python bench/load.py

The loader of train.py reads batches of 12 x 1024 tokens from 200 MB on disk, in
one thread, against the ways of nanoGPT and EasyGPT: microseconds a batch.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import tempfile
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from bench.picture import draw_bars
from bench.rounds import median, ratio
from bench.settings import check
from configurator import configure
from run import script
from text.batches import TrainLoader, TrainOrder, split_windows
from text.tokens import TokenData

repeats = 30  # rounds of 80 batches in each way
png = ""  # also draw the table into this file

ROWS, LENGTH, BATCHES, TOKENS = 12, 1024, 80, 100_000_000
MICRO_STEPS = 40  # of an update


def stacked(bins: NDArray[Any]) -> list[Tensor]:
    """A random batch, window by window: inputs and targets (B, T) int64."""
    starts = torch.randint(len(bins) - LENGTH, (ROWS,))
    return [
        torch.stack(
            [torch.from_numpy(bins[i + k : i + k + LENGTH].astype(np.int64)) for i in starts]
        )
        for k in (0, 1)
    ]


def ways_of(folder: Path) -> dict[str, Callable[[int], object]]:
    """Each reads the batch of a number, by name."""
    data = TokenData(folder, "train", LENGTH, 50304)
    order = TrainOrder(data.tokens, LENGTH, MICRO_STEPS * ROWS * LENGTH, 0)
    loader = TrainLoader(data, order, 0, 1, torch.device("cpu"))
    opened = partial(np.memmap, folder / "train.bin", dtype=np.uint16, mode="r")
    kept = opened()

    def read(i: int) -> Tensor:
        return loader.read(*divmod(i, MICRO_STEPS), ROWS)

    return {
        "a memory map for each batch, rows stacked (EasyGPT, nanoGPT)": lambda i: stacked(opened()),
        "one memory map, rows stacked": lambda i: stacked(kept),
        "ours, read": read,
        "ours, read and widened to int64": lambda i: split_windows(read(i)),
    }


def print_table(times: dict[str, list[float]]) -> list[tuple[str, float]]:
    """Medians of what has been measured, in microseconds, by name."""
    first, bars = next(iter(times.values())), []
    print("| way | microseconds | of the first |\n|---|---|---|")
    for name, mine in times.items():
        if mine:
            bars.append((name, 1e6 * median(mine)))
            print(f"| {name} | {bars[-1][1]:.0f} | {ratio(mine, first):.3f} |")
    return bars


def main() -> None:
    check(png=png, repeats=repeats)
    bars = []
    with tempfile.TemporaryDirectory() as folder:
        ids = np.random.default_rng(0).integers(0, 50257, TOKENS, dtype=np.uint16)
        ids.tofile(Path(folder, "train.bin"))
        torch.set_num_threads(1)
        ways = ways_of(Path(folder))
        times: dict[str, list[float]] = {name: [] for name in ways}
        print(f"batches of {ROWS} x {LENGTH} tokens, one thread; {BATCHES} of each way in turn")
        try:
            for turn in range(repeats):
                for name, way in ways.items():
                    t0 = time.perf_counter()
                    for i in range(turn * BATCHES, (turn + 1) * BATCHES):
                        way(i)
                    times[name].append((time.perf_counter() - t0) / BATCHES)
                last = ", ".join(f"{1e6 * mine[-1]:.0f}" for mine in times.values())
                print(f"{turn + 1}/{repeats}  {last} microseconds", flush=True)
        finally:
            bars += print_table(times)
    draw_bars(png, "microseconds a batch", bars)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
