"""What makes decoding fast: one graph for all tokens, layers for few rows, large pages."""

import mmap
import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from making.sampling import Model, cache_length
from text.files import named_reason

HUGE_PAGE = 2**21  # bytes
FEW_ROWS = 64
GRAPHS = 64  # of decode, in a process


def compile_decode(model: Model, length: int, batch: int = 1) -> str:
    """Compile model.decode, for a batch and texts of `length` tokens at once.

    Other batches and lengths compile when they come, or by another call, up to 64 for all models
    of the process. Returns "", or why it failed: decode is then uncompiled, for every length.
    Copy a model before, not after. Between the tokens of one cache the model's mode, types and
    settings must stay, and one thread at a time decodes: torch's switch for this is the process's.
    """
    plain = getattr(model.decode, "uncompiled", model.decode)
    # a graph for each length of the cache, batch and model: torch's own limit is 8; as an argument
    # of torch.compile it is not in torch 2.11
    torch._dynamo.config.recompile_limit = max(GRAPHS, torch._dynamo.config.recompile_limit)
    last: weakref.ref[Any] | None = None

    def decode(idx: Tensor, position: Tensor, cache: Any, pad: Tensor) -> Tensor:
        nonlocal last
        # Within a text only tensors are looked at again, not weights and settings: all guards
        # take a twentieth of a token's time. A cache is of one text.
        known = last is not None and last() is cache
        skip = torch.compiler.set_stance(skip_guard_eval_unsafe=True) if known else nullcontext()
        with skip:
            logits: Tensor = compiled(idx, position, cache, pad)
        last = weakref.ref(cache)
        return logits

    decode.uncompiled = plain  # type: ignore[attr-defined]
    options: dict[str, Any] = {"cpp.enable_floating_point_contract_flag": "fast"}  # one rounding
    try:
        with torch.no_grad():
            context = model.config.max_position_embeddings
            cache = model.new_cache(batch, cache_length(length, context))
            if cache.keys[0].is_cuda:
                options["coordinate_descent_tuning"] = True  # one row times a weight: a loop
            # fullgraph: past the limit an error; a plain call would be followed by one
            compiled: Any = torch.compile(plain, dynamic=False, fullgraph=True, options=options)
            model.decode = decode  # type: ignore[method-assign]
            zeros = torch.zeros(batch, dtype=torch.int64, device=cache.keys[0].device)
            model.decode(zeros[:, None], zeros[:1].clone(), cache, zeros.clone())
    except Exception as e:  # whatever a compiler, a driver or a full disk may raise
        model.decode = plain  # type: ignore[method-assign]
        return named_reason(e)[:120]
    return ""


class FewRowsLinear(nn.Linear):
    """A linear layer for few rows on a CPU, where x @ w.T is made for many.

    One row is compiled to a loop that reads the weight as fast as memory gives it; uncompiled it is
    torch's product with a vector in bfloat16. For some rows w @ x.T is faster than x @ w.T. What
    each way is worth stands in docs/speed.md.
    """

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs)."""
        rows = x.numel() // x.size(-1)
        if rows == 1 and torch.compiler.is_compiling():
            y = dot(self.weight, x.reshape(1, -1)).to(x.dtype)
        elif rows == 1 and x.dtype == self.weight.dtype == torch.bfloat16:
            y = torch.mv(self.weight, x.reshape(-1))
        elif 1 < rows <= FEW_ROWS:
            xt = x.reshape(rows, -1).t()
            y = (self.weight @ xt).t().contiguous()  # as attention's kernel wants it
        else:
            return F.linear(x, self.weight, self.bias)
        y = y if self.bias is None else y + self.bias
        return y.reshape(*x.shape[:-1], -1)


def dot(weight: Tensor, row: Tensor) -> Tensor:
    """weight (outputs, inputs) times row (1, inputs) for the compiler: (1, outputs) float32.

    It sums up the four parts of the weight in one loop, and so keeps four reads of memory going.
    """
    return torch.cat([(w * row).sum(1, dtype=torch.float32) for w in weight.chunk(4)])[None]


def for_few_rows(model: nn.Module) -> None:
    """Make the linear layers of a model on a CPU FewRowsLinear, for small batches."""
    for layer in model.modules():
        if type(layer) is nn.Linear:
            layer.__class__ = FewRowsLinear


def use_huge_pages(model: torch.nn.Module) -> int:
    """Move a model's tensors on a CPU into one block and ask Linux for pages of 2 MiB for it.

    Returns the bytes of the tensors.

    Each page of memory has to be looked up before it is read, and a token reads all weights once.
    The tensors then share one storage, which torch.save writes whole with any of them: for a model
    that only makes text.
    """
    found = {id(t): t for t in (*model.parameters(), *model.buffers()) if t.is_cpu}
    sizes = {key: -(-t.nbytes // 64) * 64 for key, t in found.items()}  # whole lines of the cache
    try:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
        block = mmap.mmap(-1, sum(sizes.values()) + HUGE_PAGE, flags=flags)
        block.madvise(mmap.MADV_HUGEPAGE)
    except (AttributeError, OSError):  # another system, or a kernel without
        return sum(sizes.values())
    memory = torch.frombuffer(block, dtype=torch.uint8)
    start = -memory.data_ptr() % HUGE_PAGE
    for key, t in found.items():
        place = memory[start : start + t.nbytes].view(t.dtype).view(t.shape)
        t.data = place.copy_(t.detach())
        start += sizes[key]
    return sum(sizes.values())
