"""16-bit copies of the layers' float32 weights ("master weights"), cast once an update.

Autocast casts the weights in each micro-step, keeps what it cast until the backward pass, and casts
the gradients back. The numbers are the same bits either way, but for what a compiler rounds.
"""

import torch
from torch import Tensor, nn

from model import GPT


def matrices_of(model: GPT) -> list[nn.Linear]:
    """The layers' linear modules. Not the head: its gradient in pieces comes in float32."""
    return [m for m in model.layers.modules() if isinstance(m, nn.Linear)]


class Copies:
    """The layers' weights in `dtype`, lent to the model while gradients are summed up.

    The gradients of the copies are added to the weights' own, in float32, as they come.
    """

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.linear, self.dtype = matrices_of(model), dtype
        self.weights: list[Tensor] = [m.weight for m in self.linear]
        self.copies: list[Tensor] = []  # from the first time they are lent

    def lend(self) -> None:
        """Have the model compute with copies of its weights as they are now."""
        with torch.no_grad():
            if self.copies:
                torch._foreach_copy_(self.copies, self.weights)
            else:
                self.copies = [self.copy_of(weight) for weight in self.weights]
        for module, copy in zip(self.linear, self.copies, strict=True):
            copy.grad = None  # of a backward pass that failed half way
            module.weight = copy

    def take_back(self) -> None:
        """Give the model its own weights again."""
        for module, weight in zip(self.linear, self.weights, strict=True):
            module.weight = weight

    def copy_of(self, weight: Tensor) -> nn.Parameter:
        """A parameter in `dtype` whose gradients become the weight's."""
        copy = nn.Parameter(weight.detach().to(self.dtype))

        def add_up(copy: Tensor) -> None:
            assert copy.grad is not None
            if weight.grad is None:
                weight.grad = copy.grad.float()
            else:
                weight.grad += copy.grad
            copy.grad = None

        copy.register_post_accumulate_grad_hook(add_up)  # type: ignore[no-untyped-call]
        return copy
