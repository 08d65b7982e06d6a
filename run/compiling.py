"""Compiling, and a micro-step before the run: what cannot work fails while nobody waits."""

import importlib.util
import os
import shutil
import sys
import time

import torch
from torch import Tensor, nn

from model import GPT
from run.agreement import ShortElsewhere
from run.evaluation import Evaluation, loss_sums
from run.log import say
from run.machine import Machine, release_memory, save_memory
from run.microbatch import MicroBatch
from run.parallel import set_sync
from run.stop import Stopped
from text.batches import TrainLoader
from text.files import named_reason

# A CPU run shorter than this costs less uncompiled: compiling takes about a minute and saves a
# fifth of the time, at roughly 1e11 FLOP/s.
CPU_COMPILE_FLOPS = 1e14


def why_not_compile(device: torch.device) -> str:
    """Why torch.compile cannot work here, or "" when it probably can."""
    if device.type == "mps":
        return "not reliable on mps"
    if device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            return "the triton package is not installed"
        if torch.cuda.get_device_capability(device) < (7, 0):
            return "triton needs compute capability 7.0"
        return ""
    compilers = ("cl",) if sys.platform == "win32" else (os.environ.get("CXX", "g++"), "clang++")
    if not any(shutil.which(c) for c in compilers):
        return f"no C++ compiler ({' or '.join(compilers)}) on the PATH"
    return ""


def why_uncompiled(setting: str, device: torch.device, flops: float, cannot: str) -> str:
    """Why a run of so many FLOP is not compiled; "" when it is. cannot: why it could not be."""
    if setting.lower() != "auto":
        return "" if setting.lower() == "true" else "as set"
    short = device.type != "cuda" and flops < CPU_COMPILE_FLOPS
    return cannot or ("the run is too short for it to pay" if short else "")


def compile_parts(model: GPT, sharded: bool, saving: int) -> list[nn.Module]:
    """Have torch.compile take the model, or its layers one by one where they are sharded.

    saving: see save_memory. It compiles when they are first called, and may fail only then:
    `uncompile` takes it back.
    """
    save_memory(model, saving)
    parts: list[nn.Module] = list(model.layers) if sharded else [model]
    for part in parts:
        part.compile(dynamic=False)  # else a second size has symbols instead of numbers
    return parts


def uncompile(parts: list[nn.Module]) -> None:
    """Call the parts as they are again."""
    for part in parts:
        part._compiled_call_impl = None


def forward_and_backward(net: nn.Module, batch: tuple[Tensor, ...], machine: Machine) -> None:
    """A micro-step for nothing. When it fails, this frame and its graph go with the exception."""
    with machine.autocast:
        loss = net(*batch, loss_only=True)[1]
    loss.backward()


def rehearse(
    micro: MicroBatch, net: nn.Module, loader: TrainLoader, evaluation: Evaluation, machine: Machine
) -> None:
    """A micro-step and a batch of an evaluation, of which nothing stays."""
    try:
        for attempt in micro.attempts():
            with attempt:
                attempt.take_room()
                set_sync(net, micro.sharded, micro.count == 1)  # else gradients would be kept
                batch = loader.batch(micro.state.iter_num, 0, micro.size)
                forward_and_backward(net, batch, machine)
                first = next(iter(evaluation.batches(micro.size)))
                loss_sums(micro.model, [first], machine.autocast)
                attempt.agree()
    except Stopped:
        pass  # the run is told again
    finally:
        micro.optimizer.zero_grad(set_to_none=True)


def compile_or_say_why(
    setting: str,
    flops: float,
    micro: MicroBatch,
    net: nn.Module,
    loader: TrainLoader,
    evaluation: Evaluation,
    machine: Machine,
) -> None:
    """Compile the model for a run of `flops` operations, as the setting says, and rehearse.

    torch.compile fails when it is first called, not before; the run then goes on without. Raises
    ValueError when not even one window fits in memory.
    """
    why = why_uncompiled(setting, machine.device, flops, why_not_compile(machine.device))
    if why and setting.lower() == "auto":
        say(f"compile  off: {why}")
    if why and micro.agreement.alone:
        return
    if why:  # what does not fit is found while nobody waits for an exchange
        return rehearse(micro, net, loader, evaluation, machine)
    begun = time.perf_counter()
    micro.compiled, parts = True, compile_parts(micro.model, micro.sharded, micro.saving)
    try:
        rehearse(micro, net, loader, evaluation, machine)
        say(f"compile  took {time.perf_counter() - begun:.0f} s")
    except ValueError:
        raise
    except Exception as e:
        say(f"compile  failed, training uncompiled ({named_reason(e)[:120]})")
        micro.compiled = False
        uncompile(parts)
        micro.model.train()
        try:
            micro.agreement.reach()
        except Stopped:
            pass  # the run is told again
        except ShortElsewhere:  # and that rank tries again
            micro.shrink()
            rehearse(micro, net, loader, evaluation, machine)
    release_memory(machine.device)  # of a compiler that failed
