"""What attention sees, and attention of one token of a text that is being made."""

import math

import torch
from torch import Tensor


def within(segments: Tensor | None) -> Tensor | None:
    """Positions see those before them of their own segment: (B, T) int -> (B, 1, T, T) bool.

    None = there is but one.
    """
    if segments is None:
        return None
    places = torch.arange(segments.size(1), device=segments.device)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return same & (places <= places[:, None])


def past_padding(slots: Tensor, pad: Tensor) -> Tensor:
    """Positions `slots` (T,) see those before them that are no padding: (B, 1, T, T) bool.

    The first pad (B,) of a row are.
    """
    visible = (slots <= slots[:, None]) & (slots >= pad[:, None, None, None])
    # padding looks at itself: a row that sees nothing would be NaN and spread
    return visible | (slots == slots[:, None])


def attend_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Attention of one position, for the compiler: as loops, which become part of the layer's.

    q (1, nkv, nh / nkv, hd), k and v (1, nkv, S, hd), mask as in Attention; shape of q. On a CPU a
    call of F.scaled_dot_product_attention takes longer than these few products (docs/speed.md).
    """
    scores = (q[:, :, :, None].float() * k[:, :, None].float()).sum(-1)  # (1, nkv, nh / nkv, S)
    share = (scores * q.size(-1) ** -0.5).masked_fill(~mask, -math.inf).softmax(-1)
    y: Tensor = (share[..., None] * v[:, :, None].float()).sum(-2)
    return y.to(q.dtype)
