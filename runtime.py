"""What a script needs of the machine: device, number type, compiler, peak speed; how it ends."""

import contextlib
import ctypes
import errno
import faulthandler
import importlib.util
import io
import mmap
import os
import platform
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import TextIO

import torch

HUGE_PAGE = 2**21  # bytes

# Dense bf16 (fp16 where noted) TFLOP/s with fp32 accumulation, from the makers' data sheets, by the
# card's whole name without its maker, memory and socket: a laptop's card of that number is slower.
PEAK_TFLOPS = {
    "RTX 3060": 25.5,
    "RTX 3070": 40.6,
    "RTX 3080": 59.5,
    "RTX 3090": 71.0,
    "RTX 3090 Ti": 80.0,
    "RTX 4060": 30.2,
    "RTX 4060 Ti": 44.1,
    "RTX 4070": 58.3,
    "RTX 4080": 97.5,
    "RTX 4090": 165.0,
    "RTX 5090": 209.5,
    "RTX A6000": 155.0,
    **dict.fromkeys(("A100", "A100 PCIe", "A100-PCIE"), 312.0),
    "H100": 989.0,
    "H100 PCIe": 756.0,
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
    except torch.OutOfMemoryError as e:
        print(f"{script}: out of memory: {str(e).splitlines()[0]}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        watch(0)
        unlock_folders()
        for name in ("stdout", "stderr"):  # Python would fail once more on a lost terminal
            try:
                getattr(sys, name).flush()
            except (OSError, ValueError):
                setattr(sys, name, None)


class Stop:
    """Whether the user or the system has asked the run to end; `cause` says who, "" for nobody.

    The first SIGINT, SIGTERM, SIGHUP (the terminal was closed), SIGBREAK (Windows) or SIGUSR1 is
    noted, so that the run can save and end in order; a second one ends the process at once, unless
    it comes within REPEAT_S: torchrun and other supervisors pass a signal on that the process has
    got already. So is the end of a torchrun that started this process and left it behind.
    """

    REPEAT_S = 1.0

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1")

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None
        self.noted_at = 0.0
        self.under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.parent = os.getppid()
        for name in self.NAMES:
            number = getattr(signal, name, None)
            nohup = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
            if number and not nohup:
                signal.signal(number, self.note)
        if hasattr(signal, "SIGTSTP"):
            signal.signal(signal.SIGTSTP, pause)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.noted_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.noted_at > self.REPEAT_S:
            os._exit(128 + number)

    @property
    def cause(self) -> str:
        if self.signal is not None:
            return self.signal.name
        orphaned = self.under_torchrun and os.getppid() != self.parent
        return "the end of torchrun" if orphaned else ""

    def exit_code(self) -> int:
        """0 under torchrun, which takes another code for a crash and starts anew; else 128 + n."""
        if self.signal is None or self.under_torchrun:
            return 0
        return 128 + self.signal


def watch(seconds: float) -> None:
    """End the process unless this is called again within `seconds`; 0 = watch no more.

    All threads' stacks then go to stderr, and the exit code is 1. It works while the main thread
    hangs in a read from a dead network drive, where no signal handler and no thread can run.
    """
    stderr = sys.__stderr__
    if seconds and stderr is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    else:
        faulthandler.cancel_dump_traceback_later()


def pause(number: int, frame: FrameType | None) -> None:
    """Ctrl-Z: the time until `fg` does not count as hanging."""
    watch(0)
    os.kill(os.getpid(), signal.SIGSTOP)


def lock_folder(folder: Path) -> str:
    """Make this process the only one that writes to `folder`, until it ends however it ends.

    Returns a line about a holder that died without a word, or about a file system that has no
    locks; else "". Raises ValueError naming the process that holds the folder. The lock is the
    system's, on the file .lock, which names pid and host for people.
    """
    path = folder / ".lock"
    no_follow = getattr(os, "O_NOFOLLOW", 0)  # a link here could name any file of the user's
    file = os.fdopen(
        os.open(path, os.O_RDWR | os.O_CREAT | no_follow, 0o666), "r+", encoding="utf-8"
    )
    holder = file.read(1000).strip()
    line = f"took over {folder} from {holder}, which is gone" if holder else ""
    try:
        if sys.platform == "win32":
            import msvcrt

            file.seek(1 << 20)  # a locked byte cannot be read, so not one of the text
            msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno in (errno.EAGAIN, errno.EACCES, errno.EDEADLK):
            file.close()
            raise ValueError(
                f"{folder} is in use by another run ({holder or 'unknown process'}); end that one, "
                "or choose another --out_dir"
            ) from e
        last = f" (last: {holder})" if holder else ""
        line = f"{folder} cannot be locked ({e.strerror}): let no other run write there{last}"
    file.seek(0)
    file.truncate()
    file.write(f"pid {os.getpid()} on {platform.node()}")
    file.flush()
    _locks.append(file)
    return line


def unlock_folders() -> None:
    """Give back what lock_folder took, at the orderly end of a run."""
    while _locks:
        file = _locks.pop()
        file.seek(0)
        file.truncate()
        file.close()


_locks: list[TextIO] = []


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
    if kind == "cuda":
        torch.cuda.set_device(int(index or 0))
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


def keep_freed_memory() -> None:
    """Have tensors on a CPU take the memory that others have freed before; Linux with glibc only.

    glibc gives every large block back to the system, and the next one comes as pages that are
    zeroed one by one when first touched. Of a small model's bfloat16 training step that was 10 to
    19%, of transformers' a quarter. The process stays as large as it was at its peak.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
            mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own


def use_huge_pages(model: torch.nn.Module) -> None:
    """Move a model's tensors on a CPU into one block and ask Linux for pages of 2 MiB for it.

    Each page of memory has to be looked up before it is read, and a token reads all weights once:
    with pages of 4 KiB a 303M model in bfloat16 took 5% longer for it. The tensors then share one
    storage, which torch.save writes whole with any of them: for a model that only makes text.
    """
    found = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_cpu}
    sizes = {key: -(-t.nbytes // 64) * 64 for key, t in found.items()}  # whole lines of the cache
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        block = mmap.mmap(-1, sum(sizes.values()) + HUGE_PAGE, flags=flags)
        block.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # another system, or a kernel without
        return
    memory = torch.frombuffer(block, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    for key, t in found.items():
        place = memory[start : start + t.nbytes].view(t.dtype).view(t.shape)
        t.data = place.copy_(t.detach())
        start += sizes[key]


def keep_less() -> None:
    """Have torch.compile compute SwiGLU's product and the norms again in backward, not keep them.

    By default it keeps all that a matrix product reads (torch 2.13). Of the reference model this
    saves 28% of the activations; the speed was the same.
    """
    from torch._functorch import config  # only those who compile need it

    config.ban_recompute_materialized_backward = False


def peak_flops(device: torch.device) -> float | None:
    """The card's dense 16-bit FLOP/s, None for a card that is not in the table and for a CPU."""
    if device.type != "cuda":
        return None
    peak = PEAK_TFLOPS.get(short_name(torch.cuda.get_device_name(device)))
    return peak * 1e12 if peak else None


def short_name(card: str) -> str:
    """A card's name without maker, memory size and socket: "A100" for NVIDIA A100-SXM4-40GB."""
    name = re.sub(r"\b(NVIDIA|GeForce|Tesla)\b|[- ](SXM\d*|\d+ ?GB|HBM\d\w?)\b", " ", card)
    return " ".join(name.split())


def describe(device: torch.device) -> str:
    """A device as a person would call it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB"
    return f"{device.type}, {torch.get_num_threads()} threads" if device.type == "cpu" else "mps"
