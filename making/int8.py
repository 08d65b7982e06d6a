"""int8 weights for sampling on a CPU: a half of bfloat16's memory, and of the time to read it."""

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn import functional as F

from making.compiled import dot

# Rows of a prompt from which multiplying the weight out first is quicker than the kernel.
PROMPT_ROWS = 64
KERNEL_STEP = 16  # inputs that torch's kernel takes at a time; it reads past the end of any rest


class Int8Linear(nn.Module):
    """A linear layer whose weight is int8 times one scale for each output.

    For a few rows, inputs are rounded to bfloat16 and sums are float32, as torch's kernel for this
    has it; one row is compiled to a loop that rounds no input and was twice as fast. Torchao's
    weight-only int8 calls that kernel, too, but only through torch.compile, and without it
    multiplies out the weight at every call; hence these lines instead of a dependency.
    """

    weight: Tensor
    scale: Tensor

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        full = linear.weight.detach().float()
        largest = full.abs().amax(1).clamp(min=1e-30)  # a row of zeros stays one
        scale = (largest / 127).bfloat16()
        self.register_buffer("scale", scale)
        levels = (full / scale.float()[:, None]).round_().clamp_(-127, 127)
        self.register_buffer("weight", levels.to(torch.int8))
        self.bias = linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """x (..., inputs) -> (..., outputs), in the type of x."""
        rows = x.reshape(-1, x.size(-1))
        if len(rows) == 1 and torch.compiler.is_compiling():
            y = (dot(self.weight, rows) * self.scale.float()).to(x.dtype)
        elif len(rows) >= PROMPT_ROWS or self.weight.size(1) % KERNEL_STEP:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale.to(x.dtype)
        else:
            scale = self.scale.bfloat16()  # whatever model.to() has made of it
            y = torch._weight_int8pack_mm(rows.bfloat16(), self.weight, scale).to(x.dtype)
        y = y if self.bias is None else y + self.bias
        return y.view(*x.shape[:-1], -1)


def quantize(model: nn.Module) -> None:
    """Replace every linear layer of the model by an Int8Linear; an embedding stays as it is.

    The model can then neither be trained nor saved.
    """
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, nn.Linear):
                setattr(parent, name, Int8Linear(child))
