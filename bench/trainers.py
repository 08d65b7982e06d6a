"""Training steps in processes of their own: python -m bench.trainers steps|peak KIND

`steps` makes a step for each line of stdin and prints its seconds, and on a GPU the bytes of the
tensors at the peak of memory so far; `peak` prints those of a CPU. What one process sets, such as
the allocator, is not the others'.
"""

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from bench.commands import run, started
from bench.gpu_probe import memory_figures, seconds
from bench.models import Shape, build
from plan import fit
from plan.memory import Training
from run import machine, script
from run.copies import Copies
from run.optim import configure_optimizer

MODULE = "bench.trainers"  # this one, whatever it is called when it runs


class Kind(NamedTuple):
    """What a training process runs."""

    name: str  # ours, transformers, or the path of a peer's model.py
    compiled: bool
    shape: Shape
    dtype: str  # float32, or bfloat16 by autocast
    device: str = "cpu"  # or cuda, cuda:1
    micro_steps: int = 1  # of a step, each of all its windows

    @property
    def title(self) -> str:
        """For people."""
        path = Path(self.name)
        short = path.parent.name if path.name == "model.py" else path.stem
        return f"{short}, {'compiled' if self.compiled else 'eager'}"

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.shape.tokens * self.micro_steps


# --- in the process


class Trainer:
    """A model that makes training steps on random tokens."""

    def __init__(self, kind: Kind) -> None:
        self.micro_steps = kind.micro_steps
        device = self.device = machine.select_device(kind.device)
        dtype, _ = machine.select_dtype(kind.dtype, device)
        if device.type == "cuda":
            machine.tune(device)  # as the others' train.py do
        if kind.name == "ours":  # as train.py has it
            machine.keep_freed_memory()
        self.model, self.loss = build(kind.name, kind.shape.config)
        self.model.to(device)
        self.copies: Copies | None = None
        if kind.name == "ours":
            training = training_of(kind, dtype, device)
            machine.save_memory(self.model, training.saving)
            machine.choose_attention(self.model, dtype)
            if training.copies:
                self.copies = Copies(self.model, dtype)
        if hasattr(self.model, "configure_optimizers"):
            self.optimizer = self.model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), device.type)
        else:
            self.optimizer = configure_optimizer(self.model, 1e-3, (0.9, 0.95), 0.1)
        self.net = torch.compile(self.model) if kind.compiled else self.model
        size = kind.shape.batch, kind.shape.context
        self.x, self.y = (torch.randint(0, 50257, size, device=device) for _ in range(2))
        self.autocast = machine.autocast(device, dtype)

    def step(self) -> float:
        """Forward and backward of each micro-step, clip, update; the seconds that they took."""
        return seconds(self.device, self.work)

    def work(self) -> None:
        """What a step does."""
        if self.copies:
            self.copies.lend()
        for _ in range(self.micro_steps):
            with self.autocast:
                loss = self.loss(self.net, self.x, self.y) / self.micro_steps
            loss.backward()
        if self.copies:
            self.copies.take_back()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0).item()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def training_of(kind: Kind, dtype: torch.dtype, device: torch.device) -> Training:
    """Our training, which saves as much memory as train.py decides."""
    windows = kind.shape.batch * kind.micro_steps
    training = Training(
        kind.shape.config, dtype, device.type, kind.compiled, False, kind.micro_steps > 1
    )
    return fit.as_needed(training, kind.shape.batch, windows, fit.room_of(device))


def make_steps(kind: Kind) -> None:
    """Make a training step for each line of stdin; print its seconds and a GPU's peak, or 0."""
    answers, sys.stdout = sys.stdout, sys.stderr  # peers print, too
    trainer = Trainer(kind)
    for i, _ in enumerate(sys.stdin):
        took = trainer.step()
        peak = memory_figures(trainer.device, reset=i == 0).get("peak", 0)  # not the compiler's
        print(took, peak, file=answers, flush=True)


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
    what, (name, compiled, shape, *how) = sys.argv[1], json.loads(sys.argv[2])
    kind = Kind(name, compiled, Shape(*shape), *how)
    if what == "steps":
        make_steps(kind)
    else:
        print(peak_memory(kind))


# --- outside of it


class Runner:
    """Asks a process for training steps."""

    def __init__(self, title: str, process: subprocess.Popen[bytes]) -> None:
        self.title, self.process = title, process
        self.peak = 0  # bytes, on a GPU

    def step(self) -> float:
        """One more step: its seconds. Raises ValueError when the process has died."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(b"\n")
            took, peak = self.process.stdout.readline().split()
            self.peak = int(peak)
            return float(took)
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
