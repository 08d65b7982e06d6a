"""Attention of one token of a text that is being made."""

import math

from torch import Tensor


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one position, for the compiler: as loops, which become part of the layer's.

    q (1, nkv, nh / nkv, hd), k and v (1, nkv, S, hd), mask as in Attention; shape of q. On a CPU a
    call of F.scaled_dot_product_attention takes longer than these few products (docs/speed.md).
    """
    scores = (q[:, :, :, None].float() * k[:, :, None].float()).sum(-1)  # (1, nkv, nh / nkv, S)
    share = (scores * q.size(-1) ** -0.5).masked_fill(~mask, -math.inf).softmax(-1)
    y: Tensor = (share[..., None] * v[:, :, None].float()).sum(-2)
    return y.to(q.dtype)
