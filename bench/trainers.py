"""Training steps in processes of their own: python -m bench.trainers steps|peak KIND

`steps` makes a step for each line of stdin and prints its seconds; `peak` prints the bytes of the
tensors at the peak of memory. What one process sets, such as the allocator, is not the others'.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.commands import run, started
from bench.models import Shape, build
from run import machine, script
from run.optim import configure_optimizer

MODULE = "bench.trainers"  # this one, whatever it is called when it runs


class Kind(NamedTuple):
    """What a training process runs."""

    name: str  # ours, transformers, or the path of a peer's model.py
    compiled: bool
    shape: Shape
    dtype: str  # float32, or bfloat16 by autocast

    @property
    def title(self) -> str:
        """For people."""
        short = Path(self.name).parent.name if self.name.endswith(".py") else self.name
        return f"{short}, {'compiled' if self.compiled else 'eager'}"


# --- in the process


class Trainer:
    """A model that makes training steps on random tokens."""

    def __init__(self, kind: Kind) -> None:
        if kind.name == "ours":  # as train.py has it
            machine.keep_freed_memory()
            machine.keep_less()
        self.model, self.loss = build(kind.name, kind.shape.config)
        if hasattr(self.model, "configure_optimizers"):
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), "cpu")
        else:
            self.optimizer = configure_optimizer(self.model, 1e-3, (0.9, 0.95), 0.1)
        self.net = torch.compile(self.model) if kind.compiled else self.model
        size = kind.shape.batch, kind.shape.context
        self.x, self.y = torch.randint(0, 50257, size), torch.randint(0, 50257, size)
        self.autocast = torch.autocast("cpu", torch.bfloat16, enabled=kind.dtype == "bfloat16")

    def step(self) -> float:
        """Forward, backward, clip, update; the seconds that they took."""
        t0 = time.perf_counter()
        with self.autocast:
            loss = self.loss(self.net, self.x, self.y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return time.perf_counter() - t0


def make_steps(kind: Kind) -> None:
    """Make a training step for each line of stdin, and print its seconds."""
    answers, sys.stdout = sys.stdout, sys.stderr  # peers print, too
    trainer = Trainer(kind)
    for _ in sys.stdin:
        print(trainer.step(), file=answers, flush=True)


def peak_memory(kind: Kind) -> int:
    """Largest sum of live CPU tensors, bytes, in three training steps, weights and all included.

    From the allocator's events that the profiler records, so that compiled code counts, too.
    """
    from torch.profiler import ProfilerActivity, profile

    if kind.compiled:
        Trainer(kind).step()  # compiling allocates, too; its result is kept
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        trainer = Trainer(kind)
        for _ in range(3):
            trainer.step()
    events = seen.profiler.kineto_results.events()
    live = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def main() -> None:
    what, (name, compiled, shape, dtype) = sys.argv[1], json.loads(sys.argv[2])
    kind = Kind(name, compiled, Shape(*shape), dtype)
    if what == "steps":
        make_steps(kind)
    else:
        print(peak_memory(kind))


# --- outside of it


class Runner:
    """Asks a process for training steps."""

    def __init__(self, title: str, process: subprocess.Popen[bytes]) -> None:
        self.title, self.process = title, process

    def step(self) -> float:
        """One more step: its seconds. Raises ValueError when the process has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(b"\n")
            return float(self.process.stdout.readline())
        except (OSError, ValueError) as e:
            raise ValueError(f"{self.title} made no step; its error is above") from e

    def warm_up(self) -> float:
        """Two steps that do not count; the seconds of the first, in which it may compile."""
        first = self.step()
        self.step()
        return first


@contextlib.contextmanager
def running(kind: Kind) -> Iterator[Runner]:
    """A process that waits to make steps."""
    with started(["-m", MODULE, "steps", json.dumps(kind)], stdin=subprocess.PIPE) as process:
        yield Runner(kind.title, process)


def measured_peak(kind: Kind) -> int:
    """peak_memory, in bytes, of a process of its own."""
    found = run(["-m", MODULE, "peak", json.dumps(kind)])
    return int(found.printed.splitlines()[-1])


if __name__ == "__main__":
    script.run(main)
