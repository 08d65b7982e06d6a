"""The head and its loss in pieces, for a card that cannot hold the logits of a micro-batch."""

from typing import Any

import torch
from torch import Tensor

IGNORED = -1  # a target that does not count: the model's IGNORE_INDEX


def loss_in_pieces(x: Tensor, weight: Tensor, targets: Tensor, pieces: int) -> Tensor:
    """Mean cross-entropy, () float32, in nats per target that counts.

    x (B, T, C), whose type the products have, weight (V, C), targets (B * T,) int64.
    """
    how = weight, targets, pieces, torch.is_grad_enabled()
    loss: Tensor = LossInPieces.apply(x.flatten(0, 1), *how)  # type: ignore[no-untyped-call]
    return loss


class LossInPieces(torch.autograd.Function):
    """Mean cross-entropy of a head's logits, some rows at a time: no others are ever in memory.

    The gradients are computed with the loss, while a piece's logits are there, so nothing is
    computed twice. It costs the weight's gradient, read and written by each piece.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, pieces: int, learn: bool
    ) -> Tensor:
        """As loss_in_pieces, but for x (N, C). learn: there will be a backward pass."""
        counts, targets = targets != IGNORED, targets.clamp(min=0)
        w, rows = weight.to(x.dtype), -(-len(x) // pieces)
        ids = torch.arange(len(w), dtype=torch.int32, device=x.device)
        total, dw, dx = x.new_zeros((), dtype=torch.float32), None, []
        for i in range(0, len(x), rows):
            part, wanted, count = x[i : i + rows], targets[i : i + rows], counts[i : i + rows]
            logits = part @ w.t()
            top = logits.float().amax(1, keepdim=True)
            lse = top + (logits.float() - top).exp().sum(1, keepdim=True).log()
            picked = logits.gather(1, wanted[:, None])
            total = total + ((lse - picked)[:, 0] * count).sum()
            if learn:
                hit = ids == wanted.int()[:, None]
                d = ((logits.float() - lse).exp() - hit.float()) * count[:, None]
                d = d.to(x.dtype)
                dx.append(d @ w)
                dw = d.t() @ part if dw is None else torch.addmm(dw, d.t(), part)
        if learn:
            ctx.save_for_backward(torch.cat(dx), dw, counts)
        return total / counts.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Softmax less 1 at the target, times what the loss is worth."""
        dx, dw, counts = ctx.saved_tensors
        share = grad / counts.sum()
        return (dx * share).to(dx.dtype), dw.float() * share, None, None, None
