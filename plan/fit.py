"""What fits in a device's memory: how many windows at once, and what has to be saved for them.

Everything is computed from the graph (plan/memory.py) but the reserve.
"""

import bisect
import contextlib
import math
import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from model import GPT, GPTConfig, num_parameters
from plan import memory
from plan.memory import Training
from run.compiling import why_not_compile, why_uncompiled
from run.copies import Copies
from run.log import say
from run.machine import Machine
from run.microbatch import MicroBatch
from run.team import Team
from text.files import named_reason

GIB = 2**30
# Memory that is not in the graph. On a GPU, measured on one (an H200): CUDA's context and kernels
# (0.74 GiB), cuBLAS' buffers (0.06) and gaps that the allocator could not fill (less than 0.09). On
# mps and a CPU, where it is Python and torch, assumed.
RESERVE = {"cuda": 1.0 * GIB, "mps": 1.0 * GIB, "cpu": 0.5 * GIB}
# Computed on an RTX 3090 for the reference (docs/speed.md), and for the recipe with its qk_norm:
# what a micro-step costs whatever its size (casts of weights, sums of gradients), in tokens, with
# copies of the weights and without; and how much longer its tokens take when memory is saved, where
# queries and keys are normed again and where not.
FIXED_TOKENS = {True: 118, False: 260}
SLOWER = {True: 1.013, False: 1.0035}
CPU_TOKENS = 16384  # chosen, not measured
CHECKPOINTING = "--activation_checkpointing=True"
BUCKETS, GATHERED, SHARES = "DDP's buckets", "gathered layers", "shares of all"  # parts, of ranks


def divisors(n: int) -> list[int]:
    """In rising order."""
    return [d for d in range(1, n + 1) if n % d == 0]


def parts_at_peak(training: Training, batch: int, windows: int) -> dict[str, float]:
    """Bytes of a rank by part at the peak of a step of so many windows a rank, batch at a time."""
    if training.shards > 1:
        return sharded(training, batch, windows)
    parts = memory.at_peak(replace(training, accumulates=batch < windows), batch)
    if training.ranks > 1:
        state = memory.states(training.config, training.optimizer, training.dtype)
        parts[BUCKETS] = state[memory.GRADIENTS]
    return parts


def sharded(training: Training, batch: int, windows: int) -> dict[str, float]:
    """The same when weights, gradients and moments are spread over the ranks (FSDP2).

    Beside its shares a rank has embedding, last norm and head with their gradient in float32, and
    two layers gathered in the type they compute in, with their gradients in that type and float32.
    With several micro-steps it has all layers and all gradients until the last one.
    """
    parts = memory.at_peak(replace(training, accumulates=False), batch)
    with torch.device("meta"):
        model = GPT(training.config)
    total, layer = num_parameters(model), num_parameters(model.layers[0])
    layers = training.config.num_hidden_layers * layer
    rest, width = total - layers, training.dtype.itemsize
    gathered = 8 * rest + 2 * (2 * width + 4) * layer
    if batch < windows:
        gathered = 8 * rest + (width + 4) * layers
    if training.matmul_dtype == "int8":
        gathered += layers  # whole until the backward pass
    used = {p: parts[p] for p in (memory.ACTIVATIONS, memory.LOGITS, memory.WORKSPACE)}
    state = memory.states(training.config, training.optimizer, training.dtype)
    kept = 4 * total + state[memory.OPTIMIZER]
    # when backward begins there are no shards of gradients yet; when it ends, no activations
    begins = {**used, SHARES: kept / training.shards}
    ends = {SHARES: 4 * rest + (kept + 4 * total) / training.shards}
    larger = begins if sum(begins.values()) > sum(ends.values()) else ends
    return {GATHERED: float(gathered), **larger}


def peak(training: Training, batch: int, windows: int) -> float:
    """Bytes of a rank at the peak of a step of so many windows a rank, batch of them at a time."""
    return sum(parts_at_peak(training, batch, windows).values())


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
    found = []  # cost of a token, micro-batch
    for level in training.levels:
        saving = replace(training, saving=level)
        if batch := largest_batch(saving, windows, room):
            fixed = FIXED_TOKENS[saving.copies] / (batch * context)
            slower = SLOWER[level > 1 and training.config.qk_norm] if level else 1.0
            found.append((slower * (1 + fixed), batch))
    return min(found, default=(0, 1))[1]


def smallest_change(training: Training, batch: int, windows: int, room: float) -> str:
    """What to type so that a run fits in `room` bytes; "" when it does as it is.

    In this order: a smaller micro-batch, which changes nothing of the result, shards where there
    are several ranks, activation checkpointing, which costs time, fewer layers, which are another
    model.
    """
    if peak(training, batch, windows) <= room:
        return ""
    tries = [(training, "")]
    if training.ranks > training.shards and training.dtype != torch.float16:
        shards = replace(training, shards=training.ranks, saving=1)
        tries.append((shards, "--parallel=fsdp "))
    tries += [(replace(t, checkpointing=True), f"{f}{CHECKPOINTING} ") for t, f in tries]
    for training, flags in tries:
        if found := largest_batch(training, windows, room, batch):
            return f"{flags}--batch_size={found}"

    def too_large(layers: int) -> bool:
        config = replace(training.config, num_hidden_layers=layers)
        return peak(replace(training, config=config), 1, windows) > room

    depths = range(1, training.config.num_hidden_layers)
    if layers := bisect.bisect_left(depths, True, key=too_large):
        return f"{flags}--batch_size=1 --num_hidden_layers={layers}"
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
    cannot: str,
    ranks: int = 1,
    local_ranks: int = 1,
) -> Training:
    """What the plan has to know of a run of `flops`. cannot: why it could not be compiled.

    ranks: of all machines; local_ranks: of one.
    """
    return Training(
        config,
        machine.dtype,
        machine.device.type,
        compiled=not why_uncompiled(settings["compile"], machine.device, flops, cannot),
        checkpointing=settings["activation_checkpointing"],
        accumulates=True,
        optimizer=settings["optimizer"],
        ranks=ranks,
        shards={"ddp": 1, "hsdp": local_ranks}.get(settings["parallel"], ranks),
        matmul_dtype=settings["matmul_dtype"],
    )


def settle(
    settings: Mapping[str, Any], flops: float, machine: Machine, micro: MicroBatch, team: Team
) -> None:
    """Choose what a run that is about to be compiled takes at once, if nobody has, and saves.

    As the rank with the least memory needs it, and no less than the run did before a resume: so its
    numbers stay. A plan that fails, on a torch that traces otherwise, costs a line. flops: of the
    run.
    """
    device, config, state = machine.device, micro.model.config, micro.state
    cannot = why_not_compile(device)
    training = training_of(settings, config, machine, flops, cannot, team.ranks, team.local_ranks)
    training = replace(training, copying=team.alone, by_layer=micro.sharded)
    micro.most_saving = training.leanest.saving
    room, size, windows = room_of(device), micro.size, micro.windows
    try:
        size = size or at_once(training, windows, room)
        needed = as_needed(training, size, windows, room, state.saving)
    except Exception as e:  # whatever a tracer may raise
        say(f"plan     failed, memory is saved ({named_reason(e)[:120]})")
        needed = training.leanest
    memory.captured.cache_clear()  # graphs that a run has no use for
    less, micro.saving = team.most(-size, min(max(needed.saving, state.saving), micro.most_saving))
    if needed is not training:
        state.saving = micro.saving
    if replace(needed, saving=micro.saving).copies:
        micro.copies = Copies(micro.model, machine.dtype)
    if not micro.size:
        micro.take(max(1, -less))


def as_needed(
    training: Training, batch: int, windows: int, room: float | None, least: int = 0
) -> Training:
    """The training that saves no more memory on a GPU than it has to, or `least`: that is faster.

    room: bytes of the device less the reserve; None = unknown, then it stays as it is.
    """
    if not training.chooses or room is None:
        return training
    saving = training
    for level in training.levels:
        saving = replace(training, saving=level)
        if level >= least and peak(saving, batch, windows) <= room:
            break
    return saving


def room_of(device: torch.device) -> float | None:
    """Bytes that a run on a device of this machine has, with what it holds, less the reserve."""
    free = free_memory(device)
    if free is not None and device.type == "cuda":
        free += torch.cuda.memory_reserved(device)
    return None if free is None else free - RESERVE[device.type]
