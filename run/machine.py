"""What a script needs of the machine: device, number type, compiler, memory."""

import contextlib
import ctypes
import functools
import gc
import os
import sys
from dataclasses import dataclass

import torch
from torch.nn.attention import SDPBackend

from model import GPT, Attention
from run.gpu import missing_kernels, refused_gpu

# How CUDA, Triton, cuBLAS, cuDNN, mps and the CPU's allocator say that memory is short.
SHORT_OF_MEMORY = (
    *("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED"),
    *("can't allocate memory", "not enough memory", "size calculation overflowed"),
)
LOSS_PIECES = 8  # of a micro-batch, at the higher levels of save_memory


@dataclass(frozen=True)
class Machine:
    """A device and the type that matrix products run in there."""

    device: torch.device
    dtype: torch.dtype
    why: str  # this type

    @functools.cached_property  # each micro-step enters it, and making one asks the device
    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """The context in which matrix products run in dtype."""
        return autocast(self.device, self.dtype)

    def line(self, ranks: int = 1, name: str = "") -> str:
        """What it is, for people; name: of a card that is not here."""
        name = name or describe(self.device)
        name = f"{ranks} x {name}" if ranks > 1 else name
        return f"{name}; {self.dtype} ({self.why})".replace("torch.", "")


def find_machine(device: str, dtype: str) -> Machine:
    """The machine that two settings name. Raises ValueError as select_device and select_dtype."""
    selected = select_device(device)
    return Machine(selected, *select_dtype(dtype, selected))


def is_oom(e: BaseException | None) -> bool:
    """Whether an error says that memory is short, however deep inside it says so.

    CUDA has several errors for it beside torch.OutOfMemoryError, and what runs out of memory while
    a graph is compiled or first called comes inside the compiler's own error.
    """
    seen: set[int] = set()
    while e is not None and id(e) not in seen:
        seen.add(id(e))
        if isinstance(e, torch.OutOfMemoryError | MemoryError):
            return True
        if isinstance(e, RuntimeError) and any(words in str(e) for words in SHORT_OF_MEMORY):
            return True
        e = getattr(e, "inner_exception", None) or e.__cause__
    return False


def select_device(name: str) -> torch.device:
    """The device of a setting: auto (cuda, then mps, then cpu), cpu, mps, cuda or cuda:N.

    A GPU's has its index, which torch.cuda.set_device wants. auto passes over a GPU that torch
    cannot use; `unused_gpu` tells. Raises ValueError for another name and for a device that this
    machine or torch build lacks.
    """
    mps = torch.backends.mps.is_available()
    if name == "auto":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        usable = [f"cuda:{i}" for i in range(count) if not missing_kernels(i)]
        name = [*usable, "mps" if mps else "cpu"][0]
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (index and (kind != "cuda" or not index.isdigit())):
        raise ValueError(f"device must be auto, cpu, mps, cuda or cuda:N, not {name!r}")
    if kind == "mps" and not mps:
        raise ValueError("device='mps' needs a Mac with Apple silicon; write --device=auto")
    if kind != "cuda":
        return torch.device(name)
    if not torch.cuda.is_available():
        why = "no GPU was found" if torch.version.cuda else "this torch is built without CUDA"
        why = refused_gpu() or f"{why}; write --device=auto"
        raise ValueError(f"device={name!r}, but {why}")
    number = int(index or 0)
    if number >= torch.cuda.device_count():
        there = ", ".join(f"cuda:{i}" for i in range(torch.cuda.device_count()))
        raise ValueError(
            f"device={name!r}, but the GPUs here are {there}; write one of them, or under torchrun "
            f"--nproc_per_node={torch.cuda.device_count()}"
        )
    if why := missing_kernels(number):
        raise ValueError(f"device={name!r}, but {why}")
    torch.cuda.set_device(number)
    return torch.device("cuda", number)


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
        # AVX-512's instructions alone are slow on Intel's; on AMD's assumed fast (docs/speed.md)
        avx512 = torch.cpu._is_avx512_bf16_supported()
        if torch.cpu._is_amx_tile_supported() or (avx512 and is_amd()):
            return torch.bfloat16, "the CPU has fast instructions for it"
        return torch.float32, "the CPU has no fast instructions for bfloat16"
    return torch.float32, "the safe choice on mps"


def is_amd() -> bool:
    """Whether the CPU is AMD's, as Windows and Linux tell."""
    told = os.environ.get("PROCESSOR_IDENTIFIER", "")
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as f:
        told += f.read()
    return "AuthenticAMD" in told


def autocast(device: torch.device, dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    """The context in which matrix products run in `dtype`; nothing for float32."""
    if dtype == torch.float32:
        return contextlib.nullcontext()
    context: contextlib.AbstractContextManager[None] = torch.autocast(device.type, dtype)
    return context


def tune(device: torch.device) -> None:
    """Set what makes training fast on a device, for the whole process."""
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TF32 for what autocast leaves in float32
    if device.type == "cpu":
        keep_freed_memory()


def make_deterministic(wanted: bool) -> None:
    """Have every operation give the same bits each time, on a GPU at some cost of speed.

    On CUDA the backward passes of attention and of the embedding otherwise add in any order, and
    the compiler chooses among kernels by timing them. Before the first product: cuBLAS reads its
    variable once. Operations that have no such form raise RuntimeError.
    """
    if wanted:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        rules = torch.utils.deterministic  # nobody here reads memory before it is written
        rules.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if wanted or torch.are_deterministic_algorithms_enabled():  # it loads the compiler's settings
        torch.use_deterministic_algorithms(wanted)


def release_memory(device: torch.device) -> None:
    """Give the memory of an attempt that failed back to the device, for blocks of other sizes.

    The caller holds its exception no more. The compiler's own hold their frames, with all tensors
    in them, in a circle that only the collector finds.
    """
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    if device.type == "mps":
        torch.mps.empty_cache()


def keep_freed_memory() -> None:
    """Have tensors on a CPU take the memory that others have freed before; Linux with glibc only.

    glibc gives every large block back to the system, and the next one comes as pages that are
    zeroed one by one when first touched: up to a fifth of a small model's training step
    (docs/speed.md). The process stays as large as it was at its peak.
    """
    if sys.platform == "linux":
        with contextlib.suppress(AttributeError, OSError):  # another C library
            mallopt = ctypes.CDLL(None).mallopt
            mallopt(-1, -1)  # M_TRIM_THRESHOLD: the heap never shrinks
            mallopt(-4, 0)  # M_MMAP_MAX: no block is mapped on its own


def describe(device: torch.device) -> str:
    """A device as a person would call it."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        return f"{torch.cuda.get_device_name(device)}, {total / 2**30:.0f} GiB"
    if device.type == "mps":
        return "mps"
    instructions = torch.backends.cpu.get_cpu_capability()
    if torch.cpu._is_amx_tile_supported():
        instructions += " and AMX"
    n = torch.get_num_threads()
    return f"cpu, {n} thread{'s' * (n > 1)}, {instructions}"


def save_memory(model: GPT, level: int) -> None:
    """Have a model that is about to be compiled take less memory.

    0: backward finds all that a matrix product reads, torch's default (2.13). 1: it computes
    SwiGLU's product and the norms again. 2: and the head and its loss come in pieces, and queries
    and keys are normed and turned again. 3: and an update has no copies of the weights
    (run/copies.py). On a CPU 1 is as fast as 0. On a GPU 2 is no slower than 1 (docs/speed.md).
    """
    from torch._functorch import config  # only those who compile need it

    config.ban_recompute_materialized_backward = level == 0
    # without a norm there is nothing to gain, and loops would be computed again for nothing
    config.ban_recompute_used_far_apart = level < 2 or not model.config.qk_norm
    model.loss_pieces = LOSS_PIECES if level > 1 else 1


def choose_attention(model: GPT, dtype: torch.dtype) -> str:
    """Take torch's fastest attention for the model's device and a type; the name of its kernel.

    Few kernels take fewer key heads than query heads: none on CUDA in float32 or on cards before
    Ampere. Rather than fall to plain matrix products there ("math"), key heads are copied.
    """
    c, device = model.config, model.embed_tokens.weight.device
    heads = {True: c.num_key_value_heads, False: c.num_attention_heads}
    found = {}
    for grouped, n in heads.items():
        q, k = (
            torch.empty(1, h, 16, c.head_dim, dtype=dtype, device=device, requires_grad=True)
            for h in (c.num_attention_heads, n)
        )
        choice = torch._fused_sdp_choice(q, k, k, None, c.dropout, True, enable_gqa=grouped)
        found[grouped] = SDPBackend(choice)
    grouped = found[True] != SDPBackend.MATH or found[False] == SDPBackend.MATH
    for module in model.modules():
        if isinstance(module, Attention):
            module.grouped = grouped
    return found[grouped].name.lower().removesuffix("_attention").replace("_", " ")
