"""Cross-entropy for the compiler, and in pieces for a card that cannot hold all the logits."""

from typing import Any

import torch
from torch import Tensor


def log_sum(logits: Tensor) -> Tensor:
    """(N, V) -> (N, 1) float32, the logarithm of the sum of a row's exponentials.

    In these steps the compiler reads the logits once.
    """
    top = logits.float().amax(1, keepdim=True)
    return top + (logits.float() - top).exp().sum(1, keepdim=True).log()


def slope(logits: Tensor, lse: Tensor, targets: Tensor) -> Tensor:
    """Softmax less 1 at the target: of logits (N, V), lse (N, 1) and targets (N,), float32."""
    ids = torch.arange(logits.size(1), dtype=torch.int32, device=logits.device)
    hit = ids == targets.int()[:, None]  # int32 and no scatter: the loop is vectorised
    return (logits.float() - lse).exp() - hit.float()


def loss_in_pieces(x: Tensor, weight: Tensor, targets: Tensor, ignored: int, pieces: int) -> Tensor:
    """Mean cross-entropy, () float32, in nats per target that counts.

    x (B, T, C), whose type the products have, weight (V, C), targets (B * T,) int64. ignored: the
    target that does not count.
    """
    how = weight, targets, ignored, pieces, torch.is_grad_enabled()
    loss: Tensor = LossInPieces.apply(x.flatten(0, 1), *how)  # type: ignore[no-untyped-call]
    return loss


class LossInPieces(torch.autograd.Function):
    """Mean cross-entropy of a head's logits, some rows at a time: no others are ever in memory.

    The gradients are computed with the loss, while a piece's logits are there, so nothing is
    computed twice. It costs the weight's gradient, read and written by each piece.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, ignored: int, pieces: int, learn: bool
    ) -> Tensor:
        """As loss_in_pieces, but for x (N, C). learn: there will be a backward pass."""
        counts, targets = targets != ignored, targets.clamp(min=0)
        w, rows = weight.to(x.dtype), -(-len(x) // pieces)
        total, dw, dx = x.new_zeros((), dtype=torch.float32), None, []
        for i in range(0, len(x), rows):
            part, wanted, count = x[i : i + rows], targets[i : i + rows], counts[i : i + rows]
            logits = part @ w.t()
            lse = log_sum(logits)
            picked = logits.gather(1, wanted[:, None])
            total = total + ((lse - picked)[:, 0] * count).sum()
            if learn:
                d = (slope(logits, lse, wanted) * count[:, None]).to(x.dtype)
                dx.append(d @ w)
                dw = d.t() @ part if dw is None else torch.addmm(dw, d.t(), part)
        if learn:
            ctx.save_for_backward(torch.cat(dx), dw, counts)
        return total / counts.sum().clamp(min=1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Softmax less 1 at the target, times what the loss is worth."""
        dx, dw, counts = ctx.saved_tensors
        share = grad / counts.sum().clamp(min=1)
        return (dx * share).to(dx.dtype), dw.float() * share, None, None, None, None
