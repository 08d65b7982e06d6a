"""Muon: updates of a matrix that turn all its directions by the same amount."""

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from formats.pack import gathered
from run.parallel import part_of

MOMENTUM = 0.95  # how much of the mean gradient an update keeps
BETA2 = 0.95  # the same of the mean squares of an update's rows
RMS = 0.2  # of an update's numbers before the rate: AdamW's (arXiv 2502.16982)
# Polar Express (arXiv 2505.16932): each step makes a x + b x^3 + c x^5 of a singular value x, and
# five of them bring all from 0.001 to 1 near 1. MARGIN is the paper's, for rounding.
STEPS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
)
MARGIN = 1.01
AT_ONCE = 2**25  # numbers in one batched product: a few calls, and little memory for them


def orthogonal(matrices: Tensor) -> Tensor:
    """The nearest matrices with singular values 1, nearly: (n, rows, columns), same shape.

    In the type of `matrices`, float32 or bfloat16: products of the shorter side alone.
    """
    tall = matrices.size(1) > matrices.size(2)
    x = matrices.mT if tall else matrices
    norm = x.float().square().sum((1, 2), keepdim=True).sqrt()  # no singular value is larger
    x = x / (1.02 * norm + 1e-6).to(x.dtype)
    for step in STEPS:
        a, b, c = (k / MARGIN**power for k, power in zip(step, (1, 3, 5), strict=True))
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(torch.optim.AdamW):
    """Muon (Keller Jordan, 2024) for the matrices inside the blocks, AdamW for what else there is.

    A matrix's update is orthogonal(its gradient's running mean), each row divided by the root of
    its running mean square (NorMuon, arXiv 2510.05491). Its numbers are then made as large as
    AdamW's, so that rate and decay mean the same for both. Matrices of one shape are turned
    together, in `dtype`, float32 or bfloat16. A step spends their gradients.
    """

    def __init__(
        self, groups: list[dict[str, Any]], rate: float, betas: tuple[float, float],
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        """The groups with a `momentum` are Muon's."""
        super().__init__(groups, lr=rate, betas=betas, fused=True)
        self.dtype = dtype
        # else GradScaler leaves it to the optimizer to see what is not finite
        self._step_supports_amp_scaling = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        """As of any optimizer: AdamW's own looks for its moments in all states."""
        torch.optim.Optimizer.__setstate__(self, state)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """One update."""
        for group in self.param_groups:
            if "momentum" in group:
                there = [p for p in group["params"] if p.grad is not None]
                for same in batches(there):
                    self.turn(same, group)
        super().step()  # of what still has a gradient

    def turn(self, params: list[Tensor], group: dict[str, Any]) -> None:
        """Update matrices of one shape."""
        for p in params:
            if not self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
                self.state[p]["row_squares"] = torch.zeros(p.size(0), device=p.device)
            mean, grad = self.state[p]["momentum_buffer"], cast(Tensor, p.grad)
            mean.lerp_(grad, 1 - group["momentum"])
            grad.lerp_(mean, group["momentum"])  # Nesterov's
        # gathered: a matrix can only be turned whole
        grads = torch.stack([gathered(cast(Tensor, p.grad).to(self.dtype)) for p in params])
        for p, turned in zip(params, orthogonal(grads), strict=True):
            update, squares = turned.to(p.dtype), self.state[p]["row_squares"]
            squares.lerp_(update.square().mean(1), 1 - BETA2)
            update = update / (squares.sqrt() + 1e-8)[:, None]
            update *= RMS * math.sqrt(p.numel()) / (update.norm() + 1e-8)
            p.grad = None
            p.mul_(1 - group["lr"] * group["weight_decay"])
            p.add_(part_of(p, update), alpha=-group["lr"])


def batches(params: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Matrices of one shape, so many that they have AT_ONCE numbers at most."""
    by_shape = sorted(params, key=lambda p: tuple(p.shape))  # stable: the same on all ranks
    for shape, found in itertools.groupby(by_shape, lambda p: tuple(p.shape)):
        same, most = list(found), max(1, AT_ONCE // math.prod(shape))
        yield from (same[i : i + most] for i in range(0, len(same), most))


def operations(shapes: Iterable[Sequence[int]]) -> float:
    """FLOP of the products of an update of matrices of these shapes."""
    sides = [sorted(shape) for shape in shapes]
    return len(STEPS) * sum(4.0 * m * m * n + 2.0 * m**3 for m, n in sides)


def workspace(params: Iterable[Tensor], dtype: torch.dtype) -> int:
    """Bytes that a step takes for the largest of its batches, beside what it keeps."""
    most = 0.0
    for same in batches(params):
        short, long = sorted(same[0].shape)
        most = max(most, len(same) * short * (3 * long + 2 * short))
    return int(most) * dtype.itemsize
