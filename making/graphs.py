"""A token's step as one CUDA graph: a GPU is told at once what else takes hundreds of calls."""

import dataclasses
import weakref
from typing import Any

import torch
from torch import Tensor

from making.sampling import Model, cache_length
from text.files import named_reason

WARM_UP = 3  # steps before one is recorded: they choose kernels and make room for them


class TokenGraph:
    """A model's decode, recorded with a cache, and played again with other tokens.

    A recorded step reads and writes the same memory whenever it is played: the cache's tensors, and
    tensors for what decode is given. One text at a time has the cache. The weights have to stay
    where they are.
    """

    def __init__(self, decode: Any, cache: Any, other: "TokenGraph | None" = None) -> None:
        """other: an earlier graph, whose memory for work this one uses, too."""
        batch, device = len(cache.keys[0]), cache.keys[0].device
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        self.cache = cache
        self.lent: weakref.ref[Any] | None = None
        self.given = zeros[:, None], zeros[:1].clone(), zeros.clone()
        idx, position, pad = self.given
        for _ in range(WARM_UP):
            decode(idx, position, cache, pad)
        self.graph = torch.cuda.CUDAGraph()
        self.stream: Any = other.stream if other else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        pool = other.graph.pool() if other else None
        with (
            torch.cuda.stream(self.stream),  # puts stream and device back, whatever is raised
            torch.cuda.graph(self.graph, pool=pool, stream=self.stream),
        ):
            self.logits: Tensor = decode(idx, position, cache, pad)

    def __call__(self, *given: Tensor) -> Tensor:
        """idx, position and pad of decode -> its logits (B, V)."""
        for mine, new in zip(self.given, given, strict=True):
            mine.copy_(new)
        self.graph.replay()
        return self.logits.clone()  # the next token's are written over these

    def lend(self) -> Any:
        """The cache, empty, for a text; None while another has it, or where it cannot be written.

        That is out of torch.inference_mode, when the cache was made in it.
        """
        tensors = self.cache.keys + self.cache.values
        taken = self.lent is not None and self.lent() is not None
        if taken or (tensors[0].is_inference() and not torch.is_inference_mode_enabled()):
            return None
        torch._foreach_zero_(tensors)
        lent = dataclasses.replace(self.cache)
        self.lent = weakref.ref(lent)
        return lent

    def has(self, cache: Any) -> bool:
        """Whether this is the cache that was lent last."""
        return self.lent is not None and self.lent() is cache


def record_decode(model: Model, length: int, batch: int = 1) -> str:
    """Make model.decode, compiled or not, a CUDA graph for a batch and texts of `length` tokens.

    The model has to be on a GPU. Further batches and lengths are recorded by further calls and stay
    as they are without; so does a text that begins while another of its size is being made. Returns
    "", or why it failed: then nothing is recorded any more, and decode is as it was. Each graph
    keeps its cache; the memory for work is shared.
    """
    decode = getattr(model.decode, "unrecorded", model.decode)
    new_cache = getattr(model.new_cache, "unrecorded", model.new_cache)
    graphs: dict[tuple[int, int], TokenGraph] = getattr(model.new_cache, "graphs", {})
    size = cache_length(length, model.config.max_position_embeddings)
    try:
        with torch.no_grad():
            other = next(iter(graphs.values()), None)
            graphs[batch, size] = TokenGraph(decode, new_cache(batch, size), other)
    except Exception as e:  # whatever a driver may raise
        graphs.clear()  # and the memory may be what another text needs
        return named_reason(e)[:120]

    def lent_cache(batch: int, length: int) -> Any:
        graph = graphs.get((batch, length))
        lent = graph.lend() if graph else None
        return lent or new_cache(batch, length)

    def played(idx: Tensor, position: Tensor, cache: Any, pad: Tensor) -> Tensor:
        graph = graphs.get((len(idx), cache.length))
        if graph and graph.has(cache):
            return graph(idx, position, pad)
        logits: Tensor = decode(idx, position, cache, pad)
        return logits

    lent_cache.unrecorded, lent_cache.graphs = new_cache, graphs  # type: ignore[attr-defined]
    played.unrecorded = decode  # type: ignore[attr-defined]
    played.uncompiled = getattr(decode, "uncompiled", decode)  # type: ignore[attr-defined]
    model.decode, model.new_cache = played, lent_cache  # type: ignore[method-assign]
    return ""
