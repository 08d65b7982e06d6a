"""Speed of making text: python bench/decode.py --layers=24 --hidden=1024

Greedy text from random weights (24 x 1024 is the reference's shape).
sample.py's ways, but for its choice of type and threads, stand against
transformers' cached generate, other model.py files and, where llama-cpp-python
is installed, llama.cpp: tokens/s, and the weights read in a second against what
memory gives.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import re
import tempfile
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from bench.decoders import (
    Decoder,
    llama_cpp_decoders,
    our_decoders,
    peer_decoder,
    transformers_decoders,
)
from bench.gpu_probe import quickest, seconds, where
from bench.models import Shape, loud_model
from bench.picture import draw_bars
from bench.rounds import in_turn, median, ratio
from bench.settings import MODES, check, peers
from configurator import configure, settings_of
from making.compiled import use_huge_pages
from run import machine, script
from run.settings import at_least

# what
peer = ""  # other model.py files, EasyGPT's or nanoGPT's, with commas between
mode = "both"  # eager, compiled or both
dtype = "float32"  # or bfloat16: of the weights
layers = 6  # blocks of the model
hidden = 384  # a multiple of 64
cases = "1x64,1x512,8x64"  # prompts in a batch x tokens of each
new_tokens = 128  # made after each prompt, at least 2
device = "cpu"  # or cuda, cuda:1
# how
repeats = 3  # rounds
png = ""  # also draw the tables into this file


class Seconds(NamedTuple):
    """From the prompt to a token."""

    first: float
    last: float


def memory_speed(place: torch.device) -> float:
    """Bytes/s at which a device sums up 256 MB, on a CPU in the pages of sample.py's weights."""
    block, ones = torch.nn.Module(), torch.nn.Buffer(torch.ones(1 << 26, device=place))
    block.ones = ones
    use_huge_pages(block)
    return ones.nbytes / quickest(place, ones.sum)


def compare_texts(decoders: list[Decoder], ids: Tensor, n: int) -> None:
    """Print how long each one's text is the first one's. What is to be compiled is, by this."""
    first: list[int] = []
    for d in decoders:
        text = list(d.generate(ids, n))
        first = first or text
        same = next((i for i, (a, b) in enumerate(zip(text, first, strict=True)) if a != b), n)
        words = f"tokens as {decoders[0].name}'s before the first other one"
        print(f"{d.name}: {same} of {n} {words}", flush=True)


def time_texts(decoder: Decoder, ids: Tensor, n: int) -> Seconds:
    """A text of one token and one of n."""
    return Seconds(*(seconds(ids.device, partial(decoder.generate, ids, k)) for k in (1, n)))


def print_table(
    decoders: list[Decoder], times: dict[str, list[Seconds]], rows: int, n: int, top: float
) -> list[tuple[str, float]]:
    """Medians of what has been measured, of `rows` texts of n tokens; tokens/s by name.

    top: the bytes/s that memory gives.
    """
    print(
        "| way | first token, s | tokens/s | times transformers | after the first: tokens/s "
        "| times transformers | MB of weights a step | of memory's speed |"
    )
    print("|---|---|---|---|---|---|---|---|")
    later = {name: [(t.last - t.first) / (n - 1) for t in mine] for name, mine in times.items()}
    whole = {name: [t.last for t in mine] for name, mine in times.items()}
    reference, bars = decoders[0].name, []
    for d in decoders:
        if times[d.name]:
            first = median(t.first for t in times[d.name])
            speed, step = rows * n / median(whole[d.name]), median(later[d.name])
            all_times = ratio(whole[reference], whole[d.name])
            later_times = ratio(later[reference], later[d.name])
            print(
                f"| {d.name} | {first:.2f} | {speed:.1f} | {all_times:.2f} | {rows / step:.1f} "
                f"| {later_times:.2f} | {d.weight_bytes / 1e6:.0f} "
                f"| {d.weight_bytes / step / top:.0%} |",
                flush=True,
            )
            bars.append((d.name, speed))
    return bars


def measure(decoders: list[Decoder], ids: Tensor, n: int, repeats: int) -> list[tuple[str, float]]:
    """A case: texts, rounds, and the table of what has been measured; tokens/s by name."""
    rows, prompt = ids.shape
    print(f"\n{rows} x {prompt} tokens, then {n} new ones", flush=True)
    top = memory_speed(ids.device)
    print(f"memory gives {top / 1e9:.1f} GB/s", flush=True)
    compare_texts(decoders, ids, n)
    times: dict[str, list[Seconds]] = {d.name: [] for d in decoders}
    bars = []
    try:
        for turn, name, took in in_turn(
            {d.name: partial(time_texts, d, ids, n) for d in decoders}, repeats
        ):
            times[name].append(took)
            speed = rows * n / took.last
            print(f"{turn}  {name}: {took.first:.2f} s, {speed:.1f} tokens/s", flush=True)
    finally:
        bars += print_table(decoders, times, rows, n, top)
    return bars


def main() -> None:
    check(mode, dtype, png, layers=layers, hidden=hidden, repeats=repeats)
    at_least(settings_of(globals()), new_tokens=2)
    if not re.fullmatch(r"[1-9]\d*x[1-9]\d*(,[1-9]\d*x[1-9]\d*)*", cases):
        raise ValueError(f"cases must be BATCHxPROMPT with commas between, not {cases!r}")
    others = peers(peer)
    shapes = [[int(n) for n in case.split("x")] for case in cases.split(",")]
    longest = max(prompt for _, prompt in shapes) + new_tokens
    weights, bars = getattr(torch, dtype), []  # their type
    place = machine.select_device(device)
    print(f"{layers} x {hidden}, {dtype}, {where(place)}", flush=True)
    model = loud_model(Shape(layers, hidden, 1, max(1024, longest)).config, 6).to(place, weights)
    machine.choose_attention(model, weights)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        decoders = transformers_decoders(model, folder, weights)
        decoders += our_decoders(model, MODES[mode], new_tokens)
        decoders += [peer_decoder(path, model.config, weights, place) for path in others]
        decoders += llama_cpp_decoders(model, folder, dtype)
        for rows, prompt in shapes:
            fit = [d for d in decoders if d.batches or rows == 1]
            ids = torch.randint(0, 50257, (rows, prompt)).to(place)
            found = measure(fit, ids, new_tokens, repeats)
            bars += [(f"{name}, {rows} x {prompt}", speed) for name, speed in found]
    draw_bars(png, f"new tokens/s, {layers} layers, hidden {hidden}, {dtype}", bars)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
