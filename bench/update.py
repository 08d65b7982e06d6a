"""What an update costs: python bench/update.py --hidden=256 --dtype=bfloat16

A step of AdamW and of Muon beside the micro-steps that come before it: seconds,
in turn, operations as they are counted, and the memory of the moments.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from bench.models import Shape
from bench.rounds import in_turn, median, ratio
from bench.settings import check
from configurator import configure
from model import GPT
from run import machine, optim, script
from run.cost import flops_per_token

# what
dtype = "float32"  # or bfloat16, by autocast
hidden = 256  # a multiple of 64
layers = 4  # blocks
batch = 4  # windows in a micro-step
context = 256  # tokens in a window
micro_steps = 40  # of an update, the reference's
# how
repeats = 9  # of each

RATES = 1e-3, (0.9, 0.95), 0.1


class Trial:
    """A model and its optimizer."""

    def __init__(self, shape: Shape, name: str, dtype: torch.dtype) -> None:
        self.model = GPT(shape.config)
        self.optimizer = optim.configure_optimizer(self.model, *RATES, name, dtype)
        self.autocast = machine.autocast(torch.device("cpu"), dtype)
        self.x = torch.randint(0, shape.config.vocab_size, (shape.batch, shape.context))

    def micro_step(self) -> float:
        """Forward and backward; the seconds that they took."""
        t0 = time.perf_counter()
        with self.autocast:
            loss = self.model(self.x, self.x, loss_only=True)[1]
        loss.backward()
        return time.perf_counter() - t0

    def update(self) -> float:
        """A step of the optimizer on new gradients; its seconds."""
        for p in self.model.parameters():
            p.grad = torch.randn_like(p)
        t0 = time.perf_counter()
        self.optimizer.step()
        return time.perf_counter() - t0

    def operations(self) -> float:
        """FLOP of the matrix products of an update."""
        with FlopCounterMode(display=False) as counter:
            self.update()
        return float(counter.get_total_flops())


def main() -> None:
    shape = Shape(layers, hidden, batch, context)
    check(dtype=dtype, repeats=repeats, micro_steps=micro_steps, **shape._asdict())
    kind = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    trials = {name: Trial(shape, name, kind) for name in ("adamw", "muon")}
    ways = {"micro-step": trials["adamw"].micro_step}
    ways |= {name: trial.update for name, trial in trials.items()}
    for way in ways.values():  # the first ones allocate
        way()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _, name, found in in_turn(ways, repeats):
        seconds[name].append(found)
    work = flops_per_token(trials["adamw"].model) * shape.tokens * micro_steps
    print(f"{shape}, {dtype}; a micro-step takes {median(seconds['micro-step']):.4f} s")
    head = (
        "optimizer",
        "an update, s",
        f"of {micro_steps} micro-steps",
        "FLOP, of theirs",
        "moments",
    )
    print(f"| {' | '.join(head)} |")
    print("|---|---|---|---|---|")
    for name, trial in trials.items():
        moments = 4e-6 * optim.moments(trial.optimizer.param_groups)
        time_share = ratio(seconds[name], seconds["micro-step"]) / micro_steps
        print(
            f"| {name} | {median(seconds[name]):.4f} | {time_share:.2%} | "
            f"{trial.operations() / work:.2%} | {moments:,.1f} MB |",
            flush=True,
        )


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
