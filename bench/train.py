"""Training speed and memory: python bench/train.py --mode=both
--peer=PATH/model.py

This model's training steps stand against those of transformers' Llama of the
same shape and of other model.py files, on random tokens: tokens/s, the share of
the speed of a large matrix product, peak memory of tensors.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import contextlib
import time

import torch

from bench.models import Shape
from bench.picture import draw_bars
from bench.rounds import median, ratio
from bench.settings import MODES, check, peers
from bench.trainers import Kind, measured_peak, running
from configurator import configure
from model import GPT
from run import script
from run.cost import flops_per_token

# what
peer = ""  # other model.py files, EasyGPT's or nanoGPT's, with commas between
mode = "both"  # eager, compiled or both
dtype = "float32"  # or bfloat16, by autocast
layers = 6  # blocks of the model
hidden = 384  # a multiple of 64
batch = 4  # windows in a step
context = 256  # tokens in a window
# how
repeats = 3  # rounds of three steps of each model
png = ""  # also draw the table into this file

STEPS = 3  # in a row


def matmul_peak(dtype: str) -> float:
    """FLOP/s of a large matrix product on this CPU, the best of ten."""
    a = torch.randn(2048, 2048, dtype=getattr(torch, dtype))
    times = []
    for _ in range(10):
        t0 = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - t0)
    return 2 * 2048**3 / min(times)


def time_steps(seconds: dict[Kind, list[float]], repeats: int) -> None:
    """Fill in the seconds of steps, models in turn, and print each turn."""
    with contextlib.ExitStack() as processes:
        runners = {}
        for kind in seconds:  # one starts when the last has compiled
            runners[kind] = processes.enter_context(running(kind))
            print(f"{kind.title}: first step {runners[kind].warm_up():.1f} s", flush=True)
        for i in range(repeats):
            for kind, runner in runners.items():
                found = [runner.step() for _ in range(STEPS)]
                speed = kind.shape.tokens / median(found)
                print(f"{i + 1}/{repeats}  {kind.title}: {speed:,.0f} tokens/s", flush=True)
                seconds[kind] += found


def print_table(
    seconds: dict[Kind, list[float]], peaks: dict[Kind, int], most: float
) -> list[tuple[str, float]]:
    """Medians of what has been measured, in turn; tokens/s by name.

    most: the tokens/s at which this model would have the speed of a matrix product.
    """
    print("\n| model | tokens/s | times the last | of matmul peak | peak tensor MB |")
    print("|---|---|---|---|---|")
    last, bars = list(seconds.values())[-1], []
    for kind, mine in seconds.items():
        if mine:
            speed, times = kind.shape.tokens / median(mine), ratio(last, mine)
            peak = f"{peaks[kind] / 1e6:,.0f}" if kind in peaks else "?"
            print(f"| {kind.title} | {speed:,.0f} | {times:.2f} | {speed / most:.0%} | {peak} |")
            bars.append((kind.title, speed))
    return bars


def main() -> None:
    shape = Shape(layers, hidden, batch, context)
    check(mode, dtype, png, repeats=repeats, **shape._asdict())
    names = ["ours", "transformers", *peers(peer)]
    kinds = [Kind(name, compiled, shape, dtype) for compiled in MODES[mode] for name in names]
    seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[Kind, int] = {}
    bars: list[tuple[str, float]] = []
    print(f"{shape}, {dtype}", flush=True)
    most = matmul_peak(dtype) / flops_per_token(GPT(shape.config))
    try:
        time_steps(seconds, repeats)
        for kind in kinds:
            peaks[kind] = measured_peak(kind)
            print(f"{kind.title}: peak {peaks[kind] / 1e6:,.0f} MB of tensors", flush=True)
    finally:
        bars += print_table(seconds, peaks, most)
    draw_bars(png, f"training, tokens/s, {shape}, {dtype}", bars)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
