"""What a step of bench/gpu.py is told, what it tells, and what it asks of the device."""

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from run import machine
from text.batches import TrainLoader

Figures = dict[str, Any]

GIB = 2**30
MARK = "figures "  # begins a line of them on a step's stdout
SHORTAGE = 9 * GIB  # what the step that runs out of memory has of the card


class Setup(NamedTuple):
    """What a step's process is told."""

    folder: str  # temporary, shared by all steps; the tokens are in data/
    report: str
    device: str
    tiny: bool  # toy sizes: to try the bench, not the machine
    seconds: float  # until the process is killed
    peer: str = ""  # bench/train.py's: the models that stand beside ours


def emit(*facts: str, checks: dict[str, bool] | None = None, **figures: Any) -> None:
    """Tell what has been found: text for people, what has to hold, and figures by name."""
    found = {"facts": facts, "checks": checks or {}, "figures": figures}
    print("\n" + MARK + json.dumps(found), flush=True)


def device_of(setup: Setup) -> torch.device:
    """The one that is measured."""
    return machine.select_device(setup.device)


def card_of(setup: Setup) -> str:
    """The device as the report names it."""
    return machine.describe(device_of(setup))


def where(device: torch.device) -> str:
    """The device and the versions that go with it, as the head of a table."""
    line = f"{machine.describe(device)}, torch {torch.__version__}"
    return line + f", driver {driver()}" * (device.type == "cuda")


def driver() -> str:
    """The version of NVIDIA's driver, "" where nobody tells."""
    if not (smi := shutil.which("nvidia-smi")):
        return ""
    query = [smi, "--query-gpu=driver_version", "--format=csv,noheader"]
    told = subprocess.run(query, capture_output=True, text=True, encoding="utf-8")
    return " ".join(told.stdout.split()[:1])


def synchronise(device: torch.device) -> None:
    """Wait until the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def seconds(device: torch.device, work: Callable[[], object]) -> float:
    """How long a device takes for some work; a GPU's own clock says, by events."""
    synchronise(device)
    if device.type == "cuda":
        event: Any = torch.cuda.Event
        begin, end = event(enable_timing=True), event(enable_timing=True)
        begin.record()
        work()
        end.record()
        synchronise(device)
        return float(begin.elapsed_time(end)) / 1e3
    t0 = time.perf_counter()
    work()
    synchronise(device)
    return time.perf_counter() - t0


def quickest(device: torch.device, work: Callable[[], object]) -> float:
    """The shortest of ten times in seconds: the first ones compile, choose kernels and wake up."""
    return min(seconds(device, work) for _ in range(10))


def memory_figures(device: torch.device, reset: bool = False) -> Figures:
    """Bytes at the peak since the last reset: live tensors, the allocator's gaps, and the context.

    The context is all that is not the allocator's, other programs' too. Nothing for a CPU.
    """
    if device.type != "cuda":
        return {}
    free, total = torch.cuda.mem_get_info(device)
    peak, reserved = torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    context = total - free - torch.cuda.memory_reserved(device)
    if reset:
        torch.cuda.reset_peak_memory_stats(device)
    return {"peak": peak, "gaps": reserved - peak, "context": context}


@contextlib.contextmanager
def shortage(device: torch.device) -> Iterator[None]:
    """Let SHORTAGE be all the memory that there is. A CPU only claims to be out of it."""
    real = TrainLoader.batch

    def batch(self: TrainLoader, step: int, micro_step: int, rows: int) -> Any:
        if rows > 1:
            raise torch.OutOfMemoryError("planted")
        return real(self, step, micro_step, rows)

    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, SHORTAGE / total))  # selected before
        yield
    else:
        with mock.patch.object(TrainLoader, "batch", batch):
            yield
