"""What fits in a device's memory: how many windows at once, and what has to be saved for them.

Everything is computed from the graph (plan/memory.py) but the reserve.
"""

import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from model import GPTConfig
from plan import memory
from plan.memory import Training
from run.compiling import why_not_compile, why_uncompiled
from run.log import say
from run.machine import Machine, most_saving
from run.microbatch import MicroBatch
from run.team import Team
from text.files import named_reason

GIB = 2**30
# Memory that is not in the graph. On a GPU, measured on one (an H200): CUDA's context and kernels
# (0.74 GiB), cuBLAS' buffers (0.06) and gaps that the allocator could not fill (less than 0.09). On
# mps and a CPU, where it is Python and torch, assumed.
RESERVE = {"cuda": 1.0 * GIB, "mps": 1.0 * GIB, "cpu": 0.5 * GIB}
# Computed for the reference on an RTX 3090 (docs/speed.md): what a micro-step costs whatever its
# size (casts of weights, sums of gradients), in tokens, and how much longer it takes when memory is
# saved.
FIXED_TOKENS = 275
SLOWER = 1.01
CPU_TOKENS = 16384  # chosen, not measured


def divisors(n: int) -> list[int]:
    """In rising order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def peak(training: Training, batch: int, windows: int) -> float:
    """Bytes at the peak of a step of so many windows, batch of them at a time."""
    parts = memory.at_peak(replace(training, accumulates=batch < windows), batch)
    return sum(parts.values())


def largest_batch(training: Training, windows: int, room: float, most: int = 0) -> int:
    """The largest micro-batch (of at most `most`) that divides a step's windows and fits in `room`.

    0 when none does.
    """
    batches = [b for b in divisors(windows) if b <= (most or windows)]
    return max((b for b in batches if peak(training, b, windows) <= room), default=0)


def at_once(training: Training, windows: int, room: float | None) -> int:
    """The micro-batch that divides a step's windows and is fastest, of those that fit in `room`.

    On a GPU a larger one spares fixed costs, unless it has to save memory for that; elsewhere it
    takes at most CPU_TOKENS at once. room: None = unknown, and all fits. At least 1.
    """
    context, room = training.config.max_position_embeddings, math.inf if room is None else room
    if training.device_type != "cuda":
        plain = replace(training, compiled=False)  # takes no less, and is traced sooner
        return largest_batch(plain, windows, room, max(1, CPU_TOKENS // context)) or 1
    levels = (0, most_saving(training.dtype)) if training.compiled else (training.saving,)
    found = []  # cost of a token, micro-batch
    for level in levels:
        if batch := largest_batch(replace(training, saving=level), windows, room):
            cost = (SLOWER if level else 1) * (1 + FIXED_TOKENS / (batch * context))
            found.append((cost, batch))
    return min(found, default=(0, 1))[1]


def smallest_change(training: Training, batch: int, windows: int, room: float) -> str:
    """What to type so that a run fits in `room` bytes; "" when it does as it is.

    In this order: a smaller micro-batch, which changes nothing of the result, activation
    checkpointing, which costs time, fewer layers, which are another model.
    """
    if peak(training, batch, windows) <= room:
        return ""
    if found := largest_batch(training, windows, room, batch):
        return f"--batch_size={found}"
    training, flags = replace(training, checkpointing=True), "--activation_checkpointing=True"
    if found := largest_batch(training, windows, room, batch):
        return f"{flags} --batch_size={found}"
    for layers in range(training.config.num_hidden_layers - 1, 0, -1):
        config = replace(training.config, num_hidden_layers=layers)
        if peak(replace(training, config=config), 1, windows) <= room:
            return f"{flags} --batch_size=1 --num_hidden_layers={layers}"
    return "a smaller hidden_size, max_position_embeddings or vocabulary: not even one layer fits"


def free_memory(device: torch.device) -> float | None:
    """Bytes that a run on a device of this machine could use; None where nobody tells."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return float(torch.mps.recommended_max_memory())
    with contextlib.suppress(OSError, StopIteration):  # Linux
        with open("/proc/meminfo", encoding="utf-8") as f:
            line = next(line for line in f if line.startswith("MemAvailable"))
        return float(line.split()[1]) * 1024
    if "SC_PHYS_PAGES" in getattr(os, "sysconf_names", {}):  # macOS: all there is
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    return None


def training_of(
    settings: Mapping[str, Any],
    config: GPTConfig,
    machine: Machine,
    flops: float,
    accumulates: bool,
    cannot: str,
) -> Training:
    """What the plan has to know of a run of `flops`. cannot: why it could not be compiled."""
    return Training(
        config,
        machine.dtype,
        machine.device.type,
        compiled=not why_uncompiled(settings["compile"], machine.device, flops, cannot),
        checkpointing=settings["activation_checkpointing"],
        accumulates=accumulates,
        optimizer=settings["optimizer"],
    )


def settle(settings: Mapping[str, Any], machine: Machine, micro: MicroBatch, team: Team) -> None:
    """Choose what a run that is about to be compiled takes at once, if nobody has, and saves.

    As the rank with the least memory needs it. A plan that fails, on a torch that traces otherwise,
    costs a line.
    """
    device, config = machine.device, micro.model.config
    training = training_of(settings, config, machine, 0.0, True, why_not_compile(device))
    micro.most_saving = most_saving(machine.dtype)
    room, size, saving, windows = room_of(device), micro.size, 1, micro.windows
    if room is not None and not team.alone:
        room -= memory.states(config, "adamw", machine.dtype)[memory.GRADIENTS]  # DDP's buckets
    try:
        size = size or at_once(training, windows, room)
        if device.type == "cuda" and not micro.sharded:
            saving = as_needed(training, size, windows, room).saving
    except Exception as e:  # whatever a tracer may raise
        say(f"plan     failed, memory is saved ({named_reason(e)[:120]})")
        saving = 1 if micro.sharded else micro.most_saving
    less, micro.saving = team.most(-size, saving)
    if not micro.size:
        micro.take(max(1, -less))


def as_needed(training: Training, batch: int, windows: int, room: float | None) -> Training:
    """The training that saves no more memory on a GPU than it has to: that is faster.

    room: bytes of the device less the reserve; None = unknown, then it stays as it is.
    """
    if training.device_type != "cuda" or not training.compiled or room is None:
        return training
    whole = replace(training, saving=0)
    fits = peak(whole, batch, windows) <= room
    return whole if fits else replace(training, saving=most_saving(training.dtype))


def room_of(device: torch.device) -> float | None:
    """Bytes that a run on a device of this machine has, with what it holds, less the reserve."""
    free = free_memory(device)
    if free is not None and device.type == "cuda":
        free += torch.cuda.memory_reserved(device)
    return None if free is None else free - RESERVE[device.type]
