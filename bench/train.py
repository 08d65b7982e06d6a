"""Training speed and memory: python bench/train.py --mode=both
--peer=PATH/model.py

This model's training steps stand against those of transformers' Llama of the
same shape and of other model.py files, on random tokens: tokens/s, the share of
the speed of a large matrix product, peak memory of tensors. All models are on
the device at once.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import contextlib
import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor

import torch

from bench.gpu_probe import seconds as seconds_of
from bench.gpu_probe import where
from bench.models import Shape
from bench.picture import draw_bars
from bench.rounds import median, ratio
from bench.settings import MODES, check, peers
from bench.trainers import Kind, measured_peak, running
from configurator import configure
from model import GPT
from run import machine, script
from run.cost import flops_per_token

# what
peer = ""  # litgpt, or model.py files, EasyGPT's or nanoGPT's, with commas between
mode = "both"  # eager, compiled or both
dtype = "float32"  # or bfloat16, by autocast
layers = 6  # blocks of the model
hidden = 384  # a multiple of 64
batch = 4  # windows in a step
context = 256  # tokens in a window
micro_steps = 1  # of a step, each of all its windows
device = "cpu"  # or cuda, cuda:1
# how
repeats = 3  # rounds of three steps of each model
png = ""  # also draw the table into this file

STEPS = 3  # in a row


def matmul_peak(dtype: str, device: torch.device) -> float:
    """FLOP/s of a large matrix product on the device, the best of ten."""
    n = 8192 if device.type == "cuda" else 2048
    a = torch.randn(n, n, dtype=getattr(torch, dtype), device=device)
    return 2 * n**3 / min(seconds_of(device, lambda: a @ a) for _ in range(10))


def time_steps(
    seconds: dict[Kind, list[float]], peaks: dict[Kind, int], repeats: int, at_once: int
) -> None:
    """Fill in the seconds of steps, models in turn, and a GPU's peaks; print each turn.

    at_once: how many compile beside each other.
    """
    with contextlib.ExitStack() as processes:
        runners = {}

        def begin(kind: Kind) -> None:
            runners[kind] = processes.enter_context(running(kind))
            print(f"{kind.title}: first step {runners[kind].warm_up():.1f} s", flush=True)

        with ThreadPoolExecutor(at_once) as threads:
            list(threads.map(begin, seconds))
        for i in range(repeats):
            for kind in seconds:
                found = [runners[kind].step() for _ in range(STEPS)]
                speed = kind.tokens / median(found)
                print(f"{i + 1}/{repeats}  {kind.title}: {speed:,.0f} tokens/s", flush=True)
                seconds[kind] += found
        peaks |= {kind: runner.peak for kind, runner in runners.items() if runner.peak}


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
            speed, times = kind.tokens / median(mine), ratio(last, mine)
            peak = f"{peaks[kind] / 1e6:,.0f}" if kind in peaks else "?"
            print(f"| {kind.title} | {speed:,.0f} | {times:.2f} | {speed / most:.0%} | {peak} |")
            bars.append((kind.title, speed))
    return bars


def main() -> None:
    shape = Shape(layers, hidden, batch, context)
    check(mode, dtype, png, repeats=repeats, micro_steps=micro_steps, **shape._asdict())
    place = machine.select_device(device)
    if place.type == "cuda":
        machine.tune(place)  # as the trainers do
    there = importlib.util.find_spec("transformers") is not None
    names = ["ours", *["transformers"] * there, *peers(peer)]
    how = dtype, device, micro_steps
    kinds = [Kind(name, compiled, shape, *how) for compiled in MODES[mode] for name in names]
    seconds: dict[Kind, list[float]] = {kind: [] for kind in kinds}
    peaks: dict[Kind, int] = {}
    bars: list[tuple[str, float]] = []
    print(f"{shape}, {micro_steps} micro-steps, {dtype}, {where(place)}", flush=True)
    most = matmul_peak(dtype, place) / flops_per_token(GPT(shape.config))
    at_once = len(kinds) if place.type == "cuda" and (os.cpu_count() or 1) >= 8 else 1
    try:
        time_steps(seconds, peaks, repeats, at_once)
        for kind in kinds if place.type == "cpu" else ():
            peaks[kind] = measured_peak(kind)
            print(f"{kind.title}: peak {peaks[kind] / 1e6:,.0f} MB of tensors", flush=True)
    finally:
        bars += print_table(seconds, peaks, most)
    draw_bars(png, f"training, tokens/s, {shape}, {dtype}", bars)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
