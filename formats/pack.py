"""A state copied to the CPU in few pieces, as checkpoints are written from."""

from typing import Any

import numpy as np
import torch
from torch import Tensor


def finite(tensor: Tensor) -> bool:
    """Whether a tensor on the CPU has neither NaN nor infinities.

    By numpy where it can: torch would start as many threads as training has, and the two would
    wait for each other.
    """
    if tensor.dtype == torch.float32:
        return bool(np.isfinite(tensor.detach().numpy()).all())
    return bool(tensor.isfinite().all())


def tensors_in(value: Any) -> list[Tensor]:
    """The tensors in nested dicts, lists and tuples, in order."""
    if isinstance(value, Tensor):
        return [value]
    inner = value.values() if isinstance(value, dict) else value
    nested = isinstance(value, dict | list | tuple)
    return [t for part in inner for t in tensors_in(part)] if nested else []


class Packed:
    """A copy of nested dicts and lists on the CPU, its tensors in one piece of memory per type.

    torch.save writes a record per piece, not per tensor: for a small model that is most of its
    time. The pieces are used again by the next copy: new memory takes longer than the copying.

    Sharded tensors are made whole, one at a time, in which all their ranks take part.
    """

    def __init__(self) -> None:
        self.pieces: dict[torch.dtype, Tensor] = {}

    def copy(self, value: Any) -> Any:
        """`value` with its tensors copied; the last copy is written over. Tied ones stay tied."""
        unique = {identity(t): t for t in tensors_in(value)}
        needed: dict[torch.dtype, int] = {}
        for tensor in unique.values():
            needed[tensor.dtype] = needed.get(tensor.dtype, 0) + room_for(tensor)
        for dtype, length in needed.items():
            if dtype not in self.pieces or len(self.pieces[dtype]) != length:
                self.pieces[dtype] = torch.zeros(length, dtype=dtype)
        copies, used = {}, dict.fromkeys(needed, 0)
        for key, tensor in unique.items():
            at = used[tensor.dtype]
            copies[key] = self.pieces[tensor.dtype][at : at + tensor.numel()].view(tensor.shape)
            copies[key].copy_(gathered(tensor))
            used[tensor.dtype] += room_for(tensor)

        def replaced(part: Any) -> Any:
            if isinstance(part, Tensor):
                return copies[identity(part)]
            if isinstance(part, dict):
                return {k: replaced(v) for k, v in part.items()}
            return type(part)(map(replaced, part)) if isinstance(part, list | tuple) else part

        return replaced(value)


def take_part(value: Any) -> None:
    """What a rank does for another one's `Packed.copy` of the same value."""
    for tensor in {identity(t): t for t in tensors_in(value)}.values():
        gathered(tensor)


def gathered(tensor: Any) -> Tensor:
    """A tensor without its shards: a collective call when it has some, as FSDP's have."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor.detach()
    return full


def identity(tensor: Any) -> tuple[Any, ...]:
    """Equal for two tensors that are one, as a tied head and its embedding are.

    All ranks of sharded tensors must find the same ones equal, though a rank's shard may be empty.
    A weight's is padded in memory, so that it has an address; an optimizer state is never tied.
    """
    address = tensor.data_ptr()
    if hasattr(tensor, "full_tensor"):
        address = tensor.to_local().untyped_storage().data_ptr() or id(tensor)
    return address, tensor.shape, tensor.stride(), tensor.dtype


def room_for(tensor: Tensor) -> int:
    """Elements to keep for a tensor, so that the next one begins at a multiple of 64 bytes."""
    return -(-tensor.nbytes // 64) * 64 // tensor.element_size()
