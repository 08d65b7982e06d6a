"""Tokens to the same loss: python bench/recipes.py --dataset=PATH

A recipe (Muon, QK norm, a stable rate that falls in a line at the end) stands
against two baselines, at three small sizes: the reference's own hyperparameters
with its rate scaled to the width, and the best AdamW of a sweep. Each run is
one of train.py. Stopped, the bench goes on where it was; a finished run leaves
its curve in `curves`, a small JSON file, and is not made again. The table and
the picture are made of those.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import contextlib
import json
import math
import os
import signal
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.commands import LOOK_S, failed, started
from bench.settings import check
from configurator import configure
from run import interrupt, machine, script
from run.records import read_records
from run.settings import check_folder, check_way
from text import files
from text.files import path_of, reason
from text.tokens import TokenData

# what
dataset = ""  # a folder of data/prepare.py, with 20 million tokens for the largest size
sizes = "0.5,1.5,4"  # millions of parameters in the blocks
only = ""  # reference, adamw or recipe; empty = all
seeds = 2  # of the final pairs; the sweep has one
share = 1.0  # of the tokens, for a quick try
# how
jobs = 1  # runs at a time, which share the cores
out_dir = "out/recipes"  # where the runs live until they are finished
curves = ""  # folder of the finished curves; empty = assets/recipes, or with a share below out_dir
png = ""  # also draw the curves into this file

CONTEXT, WINDOWS = 256, 32  # 8,192 tokens an update
REFERENCE_RATE, REFERENCE_WIDTH = 3.2e-4, 1024
RECIPE_RATE = 2.5e-3  # at that width; by one over the width, as the reference's is scaled here
MUON_RATE = 1.8e-3  # at that width; by one over its root
WARMUP = 0.053  # of the updates, as the reference's 800 of 15,000
PARTS = (0.4, 0.6, 1.0)  # of the tokens that the recipe is given, each with its whole schedule
POINTS = 20  # of a curve


Settings = tuple[tuple[str, Any], ...]  # of train.py


@dataclass(frozen=True)
class Size:
    """A model of the reference's proportions, and the tokens that it is trained on."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    tokens: int

    @property
    def parameters(self) -> float:
        """In the blocks' matrices."""
        per_layer = 2 * (1 + self.kv_heads / self.heads) + 3 * 2.5  # times hidden^2
        return per_layer * self.layers * self.hidden**2

    @property
    def name(self) -> str:
        """Millions of parameters in the blocks, rounded."""
        return f"{self.parameters / 1e6:.1f}M"

    def flags(self) -> dict[str, Any]:
        """The settings of train.py that make it."""
        return {
            "num_hidden_layers": self.layers,
            "hidden_size": self.hidden,
            "intermediate_size": self.hidden * 5 // 2,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.hidden // self.heads,
            "max_position_embeddings": CONTEXT,
        }


SIZES = {  # 20, 10 and 5 tokens for each parameter in the blocks
    "0.5": Size(128, 3, 2, 1, 9_830_400),
    "1.5": Size(192, 4, 3, 1, 14_745_600),
    "4": Size(256, 6, 4, 1, 19_660_800),
    # for a GPU: fewer tokens than parameters, as many as one book shelf has
    "31": Size(512, 12, 8, 2, 13_107_200),
    "124": Size(768, 21, 12, 3, 8_192_000),
}


@dataclass(frozen=True)
class Run:
    """A run of train.py: a size, its recipe, and the share of the tokens that it is given."""

    size: Size
    name: str  # reference, adamw or recipe
    how: Settings
    seed: int = 0
    part: float = 1.0

    @property
    def updates(self) -> int:
        """How many updates it makes."""
        return round(self.size.tokens * self.part / (CONTEXT * WINDOWS))

    def key(self, share: float) -> str:
        """The name of its curve."""
        how = "-".join(f"{k}={v}" for k, v in self.how)
        seed = f"-seed={self.seed}"
        return f"{self.size.name}-{how}{seed}-part={self.part:g}" + f"-of={share:g}" * (share != 1)


def adamw(size: Size, values: Sequence[float]) -> Settings:
    """AdamW with a cosine, by a step of each ladder: rate, its end, weight decay, beta2."""
    times, end, decay, beta2 = values
    rate = times * REFERENCE_RATE * REFERENCE_WIDTH / size.hidden
    found = {"learning_rate": f"{rate:.3g}", "min_lr": f"{rate * end:.3g}"}
    return tuple({**found, "weight_decay": decay, "beta2": beta2}.items())


def recipe(size: Size) -> Settings:
    """The recipe, its rates by the width."""
    times = REFERENCE_WIDTH / size.hidden
    found: dict[str, Any] = {"optimizer": "muon", "learning_rate": f"{RECIPE_RATE * times:.3g}"}
    found |= {"muon_lr": f"{MUON_RATE * math.sqrt(times):.3g}", "min_lr": 0.0, "qk_norm": True}
    return tuple({**found, "lr_schedule": "wsd", "decay_share": 0.5}.items())


# --- a run


def flags_of(run: Run, folder: Path, data: Path, share: float) -> list[str]:
    """The command line of train.py."""
    updates = max(1, round(run.updates * share))
    settings = {
        **run.size.flags(),
        **dict(run.how),
        "dataset": f"{data}{os.sep}",
        "out_dir": folder,
        "seed": run.seed,
        "init_from": "auto",
        "tokens_per_step": CONTEXT * WINDOWS,
        "batch_size": WINDOWS,
        "compile": True if share == 1 else "auto",  # the runs are many, and their graphs few
        "max_iters": updates,
        "warmup_iters": round(WARMUP * updates),
        "eval_interval": max(1, updates // POINTS),
        "eval_windows": 512,
        "checkpoint_minutes": 5,
        "keep_last": 1,
    }
    return [f"--{k}={v}" for k, v in settings.items()]


@contextlib.contextmanager
def training(command: Sequence[str], threads: int) -> Iterator[Callable[[], bool]]:
    """A run of train.py, as a function that tells whether it has ended; left early, it is killed.

    The function raises ValueError with the last line of a run that has failed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with (
        tempfile.TemporaryFile() as err,
        started(command, environment, stdout=subprocess.DEVNULL, stderr=err) as process,
    ):

        def ended() -> bool:
            if process.poll():
                err.seek(0)
                raise failed(command, err.read())
            return process.returncode == 0

        yield ended


class Bench:
    """Runs by name, each made once, and their losses.

    A text's runs and curves never go on with another's.
    """

    def __init__(self, out: Path, kept: Path, data: Path, share: float, jobs: int) -> None:
        self.kept, self.data, self.share, self.jobs = kept, data, share, jobs
        self.text: dict[str, Any] = {"dataset": data.name}
        if data.is_dir():  # its curves are as good without it
            self.text["train_tokens"] = TokenData(data, "train", CONTEXT, 2**31).tokens
        self.out = out / "-".join(map(str, self.text.values()))

    def path(self, run: Run) -> Path:
        """Of a run's curve."""
        return self.kept / f"{run.key(self.share)}.json"

    def curve(self, run: Run) -> dict[str, Any]:
        """A finished run's curve. Raises ValueError for one that is damaged, or of another text."""
        path = self.path(run)
        try:
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            points = list(zip(found["tokens"], found["loss"], strict=True))
            losses = all(isinstance(loss, float) and 0 < loss < math.inf for _, loss in points)
            theirs, same = ({k: found[k] for k in keys} for keys in (self.text, self.head(run)))
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise ValueError(f"{path} is no curve ({reason(e)}); remove it") from e
        if not points or not losses or same != self.head(run):
            raise ValueError(f"{path} is no curve of this run; remove it")
        if theirs != self.text:
            ours, other = (", ".join(map(str, text.values())) for text in (self.text, theirs))
            raise ValueError(f"{path} is of {other}, not of {ours}; take another --curves")
        return found

    def head(self, run: Run) -> dict[str, Any]:
        """What a run's curve says of it."""
        return {"size": run.size.name, "settings": dict(run.how), "seed": run.seed}

    def keep(self, run: Run) -> None:
        """Write the curve of a run that has ended, and remove its checkpoints."""
        folder = self.out / run.key(self.share)
        points = [r for r in read_records(folder / "metrics.jsonl") if "val_loss" in r]
        where = machine.describe(machine.select_device("auto"))
        found = {
            **self.head(run),
            **self.text,
            "machine": f"{where}, torch {torch.__version__}",
            "tokens": [r["tokens"] for r in points],
            "loss": [round(r["val_loss"], 5) for r in points],
        }
        self.kept.mkdir(parents=True, exist_ok=True)
        files.write(self.path(run), json.dumps(found, indent=1) + "\n")
        for path in folder.glob("*.pt"):
            path.unlink()

    def make(self, runs: Sequence[Run]) -> None:
        """Train, as many at a time as there are jobs. The first that fails ends the others."""
        threads = max(1, (os.cpu_count() or 1) // self.jobs)
        waiting = list(runs)
        with contextlib.ExitStack() as all_runs:
            going: dict[Run, tuple[Callable[[], bool], contextlib.ExitStack]] = {}
            while waiting or going:
                while waiting and len(going) < self.jobs:
                    run = waiting.pop(0)
                    folder = self.out / run.key(self.share)
                    command = ["train.py", *flags_of(run, folder, self.data, self.share)]
                    process = all_runs.enter_context(contextlib.ExitStack())
                    going[run] = process.enter_context(training(command, threads)), process
                time.sleep(LOOK_S)
                for run in [run for run, (ended, _) in going.items() if ended()]:
                    going.pop(run)[1].close()
                    self.keep(run)

    def losses(self, runs: Sequence[Run]) -> list[float]:
        """Make the runs that are not there yet; the final losses of all."""
        there = [run for run in runs if self.path(run).exists()]
        for run in there:
            self.curve(run)  # wrong ones are found before hours of training
        self.make([run for run in runs if run not in there])
        found = [self.curve(run)["loss"][-1] for run in runs]
        for run, loss in zip(runs, found, strict=True):
            how = ", ".join(f"{k}={v}" for k, v in run.how)
            cells = run.size.name, run.name, how, str(run.seed), f"{run.part:g}", f"{loss:.4f}"
            print(f"| {' | '.join(cells)} |", flush=True)
        return found


# --- what is searched


LADDERS = {  # what the sweep of AdamW tries, one after the other, next to the best so far
    "rate": tuple(2.0**i for i in range(-3, 6)),  # times the reference's, scaled to the width
    "end": (0.0, 0.1, 0.3),  # of the rate that is left at the end; nothing is below 0
    "decay": (0.01, 0.03, 0.1, 0.3, 1.0),
    "beta2": (0.8, 0.9, 0.95, 0.99, 0.999),
}
REFERENCE = (1.0, 0.1, 0.1, 0.95)

Values = tuple[float, ...]  # a step of each ladder


def best_of(bench: Bench, size: Size, start: Values, names: Sequence[str]) -> Values:
    """The best AdamW that is found from `start`, along one ladder after the other."""
    tried: dict[Values, float] = {}

    def loss(values: Values) -> float:
        if values not in tried:
            [tried[values]] = bench.losses([Run(size, "adamw", adamw(size, values))])
        return tried[values]

    best = start
    for i, (name, ladder) in enumerate(LADDERS.items()):
        for step in (1, -1) if name in names else ():
            at = ladder.index(best[i]) + step
            while 0 <= at < len(ladder):
                values = (*best[:i], ladder[at], *best[i + 1 :])
                if loss(values) >= loss(best):
                    break
                best, at = values, at + step
    return best


def crossing(points: Sequence[tuple[float, float]], wanted: float) -> float:
    """Tokens at which a loss is reached, between runs of several lengths: (tokens, final loss).

    Between two of them the loss is taken as linear in the logarithm of the tokens, and so it is
    below the first. NaN when the longest does not reach it.
    """
    if points[-1][1] > wanted:
        return math.nan
    a, b = next((a, b) for a, b in zip(points, points[1:], strict=False) if b[1] <= wanted)
    left = (a[1] - wanted) / (a[1] - b[1])
    return a[0] * math.exp(left * math.log(b[0] / a[0]))


def spread(numbers: Sequence[float], digits: int) -> str:
    """Mean and, of several, the smallest and the largest."""
    mean = f"{statistics.mean(numbers):.{digits}f}"
    if len(numbers) == 1:
        return mean
    return f"{mean} ({min(numbers):.{digits}f} to {max(numbers):.{digits}f})"


BASELINES = ("reference", "adamw")
Compared = dict[str, list[list[Run]]]  # as `finals` returns it


def finals(size: Size, best: Values, seeds: int) -> Compared:
    """The runs to compare, by name: for each seed those of several lengths, the longest last."""
    ours = recipe(size)
    return {
        "reference": [[Run(size, "reference", adamw(size, REFERENCE), s)] for s in range(seeds)],
        "adamw": [[Run(size, "adamw", adamw(size, best), s)] for s in range(seeds)],
        "recipe": [[Run(size, "recipe", ours, s, part) for part in PARTS] for s in range(seeds)],
    }


def final_losses(bench: Bench, several: list[list[Run]]) -> list[float]:
    """Of the longest run of each seed."""
    return [bench.curve(runs[-1])["loss"][-1] for runs in several]


def ratios(bench: Bench, found: Compared, baseline: str) -> list[float]:
    """For each seed the tokens of the recipe to the baseline's final loss, over the baseline's."""
    result = []
    for runs, wanted in zip(found["recipe"], final_losses(bench, found[baseline]), strict=True):
        points = [(run.part, bench.curve(run)["loss"][-1]) for run in runs]
        result.append(crossing(points, wanted))
    return result


def rows(bench: Bench, size: Size, found: Compared) -> Iterator[str]:
    """The rows of a size in the last table: each baseline against the recipe."""
    for name in BASELINES:
        losses = [spread(final_losses(bench, found[n]), 4) for n in (name, "recipe")]
        cells = [size.name, name, *losses, spread(ratios(bench, found, name), 2)]
        yield f"| {' | '.join(cells)} |"


def draw_losses(axes: Any, bench: Bench, size: Size, found: Compared) -> None:
    """Loss against tokens, each run a line that ends in a dot."""
    for color, (name, several) in enumerate(found.items()):
        for runs in several:
            for run in runs:
                curve = bench.curve(run)
                label = name if runs is several[0] and run is runs[-1] else None
                tokens = [t / 1e6 for t in curve["tokens"]]
                axes.plot(tokens[1:], curve["loss"][1:], color=f"C{color}", label=label, lw=1)
                axes.plot(tokens[-1:], curve["loss"][-1:], "o", color=f"C{color}", ms=4)
    low = min(final_losses(bench, found["recipe"]))
    axes.set_ylim(low - 0.1, low + 1.2)
    axes.set_title(f"{size.name} parameters in the blocks")
    axes.set_xlabel("million tokens")
    axes.set_ylabel("validation loss")


def draw_ratios(axes: Any, bench: Bench, found: dict[Size, Compared]) -> None:
    """Tokens of the recipe over the baseline's against the model's size, from seed to seed."""
    for color, name in enumerate(BASELINES):
        sizes = [size.parameters / 1e6 for size in found]
        several = [ratios(bench, compared, name) for compared in found.values()]
        means = [statistics.mean(r) for r in several]
        axes.plot(sizes, means, "o-", color=f"C{color}", label=f"against {name}", lw=1, ms=4)
        axes.vlines(sizes, [min(r) for r in several], [max(r) for r in several], color=f"C{color}")
    axes.set_xscale("log")
    axes.set_xticks(sizes, [f"{size:.1f}" for size in sizes])
    axes.minorticks_off()
    axes.set_ylim(0, 1)
    axes.set_title("tokens to the baseline's loss")
    axes.set_xlabel("million parameters in the blocks")
    axes.set_ylabel("recipe over baseline")


def draw(path: str, bench: Bench, found: dict[Size, Compared]) -> None:
    """Loss against tokens at each size, and the ratio against the size; nothing without a path."""
    if not path:
        return
    from matplotlib.figure import Figure  # few draw

    figure = Figure(figsize=(4 * len(found) + 4, 4), layout="constrained")
    *columns, last = figure.subplots(1, len(found) + 1)
    for axes, (size, compared) in zip(columns, found.items(), strict=True):
        draw_losses(axes, bench, size, compared)
    draw_ratios(last, bench, found)
    for axes in (*columns, last):
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path_of(path), dpi=120)


def main() -> None:
    signal.signal(signal.SIGTERM, interrupt.stop_main)  # what it has started ends with it
    check(png=png, seeds=seeds, jobs=jobs)
    if not dataset:
        raise ValueError("dataset is empty; write --dataset=PATH, a folder of data/prepare.py")
    chosen = [name.strip() for name in sizes.split(",")]
    if unknown := [name for name in chosen if name not in SIZES]:
        raise ValueError(f"sizes must be of {', '.join(SIZES)}, not {', '.join(unknown)}")
    if only not in ("", "reference", "adamw", "recipe"):
        raise ValueError(f"only must be reference, adamw, recipe or empty, not {only!r}")
    if not 0 < share <= 1:
        raise ValueError(f"share must be above 0 and at most 1, not {share}")
    kept = curves or ("assets/recipes" if share == 1 else f"{out_dir}/curves")
    for name, folder in (("out_dir", out_dir), ("curves", kept)):
        check_way(f"{name}={folder}", path_of(folder))
    bench = Bench(path_of(out_dir), path_of(kept), check_folder(dataset).resolve(), share, jobs)
    print("| size | recipe | settings | seed | of the tokens | loss |")
    print("|---|---|---|---|---|---|", flush=True)
    best: Values = REFERENCE
    names = list(LADDERS)
    found: dict[Size, Compared] = {}
    for size in (SIZES[name] for name in chosen):
        if only in ("", "adamw"):
            best = best_of(bench, size, best, names)
            names = ["rate"]  # the others are those of the smallest size
        found[size] = finals(size, best, seeds)
        for name, several in found[size].items():
            if only in ("", name):
                bench.losses([run for runs in several for run in runs])
    if only:
        return
    print("\n| size | baseline | its loss | recipe's loss | tokens to its loss, recipe over it |")
    print("|---|---|---|---|---|")
    for size, by_name in found.items():
        for row in rows(bench, size, by_name):
            print(row)
    draw(png, bench, found)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
