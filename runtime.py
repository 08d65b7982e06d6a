"""What a script needs to know of the machine: device, number type, compiler, peak speed, exit."""

import contextlib
import importlib.util
import io
import os
import shutil
import signal
import sys
from collections.abc import Callable

import torch

# Dense bf16 (fp16 where noted) TFLOP/s with fp32 accumulation, from the makers' data sheets. The
# first name that occurs in the card's own name counts, so longer names stand first.
PEAK_TFLOPS = {
    "RTX 3090 Ti": 80.0,
    "RTX 3090": 71.0,
    "RTX 4090": 165.0,
    "RTX 5090": 209.5,
    "RTX A6000": 155.0,
    "A100": 312.0,
    "H100": 989.0,  # SXM; the PCIe card has about three quarters
    "V100": 125.0,  # fp16
    "T4": 65.0,  # fp16
}


def run(main: Callable[[], None]) -> None:
    """Call a script's main part; a user's mistake ends in one line on stderr and exit code 1.

    Mistakes are ValueError and OSError. `python -X dev` shows where they came from.
    """
    script = os.path.basename(sys.argv[0])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console starts with cp1252
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except (ValueError, OSError) as e:
        if sys.flags.dev_mode:
            raise
        print(f"{script}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)


def select_device(name: str) -> torch.device:
    """The device of a setting: auto (cuda, then mps, then cpu), cpu, mps, cuda or cuda:N.

    Raises ValueError for another name and for a device that this machine or torch build lacks.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "mps" if mps else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and (kind != "cuda" or not index.isdigit())):
        raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:N, not {name!r}")
    if kind == "mps" and not mps:
        raise ValueError("device='mps' needs a Mac with Apple silicon; write --device=auto")
    if kind == "cuda" and not torch.cuda.is_available():
        why = "this torch is built without CUDA" if not torch.version.cuda else "no GPU was found"
        raise ValueError(f"device={name!r}, but {why}; write --device=auto")
    if index and int(index) >= torch.cuda.device_count():
        raise ValueError(f"device={name!r}, but there are {torch.cuda.device_count()} GPUs")
    return torch.device(name)


def select_dtype(name: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The number type to compute in, of auto, float32, bfloat16 or float16, and why.

    Raises ValueError for another name, and for float16 on a CPU.
    """
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if name != "auto":
        if name not in dtypes:
            raise ValueError(f"dtype must be auto, float32, bfloat16 or float16, not {name!r}")
        if name == "float16" and device.type == "cpu":
            raise ValueError("dtype='float16' is not made for a CPU; write --dtype=auto")
        return dtypes[name], "as set"
    if device.type == "cuda":
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16, "the GPU computes in it"
        return torch.float16, "the GPU has no bfloat16; losses are scaled"
    if device.type == "cpu":
        if torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported():
            return torch.bfloat16, "the CPU has instructions for it"
        return torch.float32, "the CPU has no bfloat16 instructions"
    return torch.float32, "the safe choice on mps"


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """The context in which matrix products run in `dtype`; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype)
    return context


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


def peak_flops(device: torch.device) -> float | None:
    """The card's dense 16-bit FLOP/s, None for a card that is not in the table and for a CPU."""
    if device.type != "cuda":
        return None
    card = torch.cuda.get_device_name(device)
    return next((peak * 1e12 for name, peak in PEAK_TFLOPS.items() if name in card), None)


def describe(device: torch.device) -> str:
    """A device as a person would call it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else "mps"


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all its work, so that a clock reading means something."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
