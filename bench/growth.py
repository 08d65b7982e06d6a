"""How training grows: python bench/growth.py --layers=4 --hidden=256

Speed and memory of this model's training steps when context, batch or depth
change, one at a time.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

from bench.models import Shape
from bench.rounds import median
from bench.settings import check
from bench.trainers import Kind, measured_peak, running
from configurator import configure
from run import script
from text.files import path_of

# what
compile = False  # torch.compile
dtype = "float32"  # or bfloat16, by autocast
hidden = 384  # a multiple of 64
layers = 6  # and half and twice as many
batch = 4  # windows in a step; and a quarter, half and twice as many
context = 256  # tokens in a window; and half, twice and four times as many
# how
repeats = 9  # steps of each shape
png = ""  # also draw the table into this file

Figures = tuple[float, float]  # tokens/s, MB of tensors at the peak


def sweeps_of(base: Shape) -> dict[str, list[int]]:
    """The values that each changes to."""
    return {
        "context": [max(1, base.context * n // 2) for n in (1, 2, 4, 8)],
        "batch": [max(1, base.batch * n // 4) for n in (1, 2, 4, 8)],
        "layers": [max(1, base.layers * n // 2) for n in (1, 2, 4)],
    }


def measure(kind: Kind, repeats: int) -> Figures:
    """Speed and memory, each in a process of its own."""
    with running(kind) as runner:
        runner.warm_up()
        seconds = [runner.step() for _ in range(repeats)]
    return kind.shape.tokens / median(seconds), measured_peak(kind) / 1e6


def draw(
    path: str, title: str, sweeps: dict[str, list[int]], found: dict[tuple[str, int], Figures]
) -> None:
    """Speed and memory against each into a PNG; nothing without a path."""
    if not path:
        return
    from matplotlib.figure import Figure  # few draw

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    grid = figure.subplots(2, 3, sharex="col", sharey="row")
    for column, (name, numbers) in enumerate(sweeps.items()):
        for row, label in enumerate(("tokens/s", "peak MB")):
            axes = grid[row][column]
            axes.plot(numbers, [found[name, n][row] for n in numbers], "o-")
            axes.set_ylim(0, 1.1 * max(figures[row] for figures in found.values()))
            axes.spines[["top", "right"]].set_visible(False)
            if column == 0:
                axes.set_ylabel(label)
        grid[1][column].set_xlabel(name)
        grid[1][column].set_xticks(numbers)
        grid[1][column].tick_params("x", labelsize=8)
    figure.suptitle(title)
    figure.savefig(path_of(path), dpi=120)


def main() -> None:
    base = Shape(layers, hidden, batch, context)
    check(dtype=dtype, png=png, repeats=repeats, **base._asdict())
    how = f"{dtype}, {'compiled' if compile else 'eager'}"
    sweeps = sweeps_of(base)
    found: dict[tuple[str, int], Figures] = {}
    known: dict[Shape, Figures] = {}  # the base stands in each
    print(f"{base}, {how}, one changed at a time")
    print("| changed | tokens/s | peak tensor MB |\n|---|---|---|", flush=True)
    for name, numbers in sweeps.items():
        for n in numbers:
            shape = base._replace(**{name: n})
            if shape not in known:
                known[shape] = measure(Kind("ours", compile, shape, dtype), repeats)
            speed, peak = found[name, n] = known[shape]
            print(f"| {name} {n} | {speed:,.0f} | {peak:,.0f} |", flush=True)
    else_ = f"{layers} layers, batch {batch}, context {context}"
    draw(png, f"training: hidden {hidden}, else {else_}; {how}", sweeps, found)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
