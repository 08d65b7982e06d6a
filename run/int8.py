"""Training with products in int8, at the rate that GeForce cards have for it.

Dynamic quantization: each row of the operands has a scale, as in torchao's int8 training. The
blocks' linear layers multiply their output and their input's gradient in int8. The weight's
gradient, a sum over all tokens, stays in the type of the other products.
"""

import importlib.util
import time
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from model import GPT, compute_dtype
from run import cards
from run.log import say
from run.machine import release_memory
from text.files import named_reason

LEAST_SCALE = 1e-30  # of a row of zeros
MOST_TERMS = 2**31 // 127**2  # of a sum that int32 holds
ROWS = 8192  # tokens for which the fastest tiles are chosen


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (R, C) -> int8 (R, C) and scales (R, 1) float32, whose product is within half a scale of x.

    Where a number of a row is not finite its scale is not, so a product with it is not, either.
    """
    scale = (x.abs().amax(1, keepdim=True).float() / 127).clamp(min=LEAST_SCALE)
    return (x.float() / scale).round().nan_to_num(0.0).to(torch.int8), scale


@torch.library.custom_op("easygpt::int8_product", mutates_args=(), device_types="cpu")
def int8_product(
    a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    """a (M, K) @ b (N, K).t(), both int8, times a_scale (M, 1) and b_scale (N, 1), float32: (M, N).

    Sums are int32 and exact, so each device and each kernel gives the same bits.
    """
    sums: Tensor = torch._int_mm(a, b.t())
    return (sums.float() * a_scale * b_scale.t()).to(dtype)


@int8_product.register_fake
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return a.new_empty(a.size(0), b.size(0), dtype=dtype)


@int8_product.register_kernel("cuda")
def _(a: Tensor, b: Tensor, a_scale: Tensor, b_scale: Tensor, dtype: torch.dtype) -> Tensor:
    from run.int8_triton import product  # a CPU has no Triton

    return product(a, b, a_scale, b_scale, dtype)


class Product(torch.autograd.Function):
    """x @ weight.t(); it and the input's gradient are multiplied in int8."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """x (R, K), of the type that products have, weight (N, K) -> (R, N) as x."""
        (a, a_scale), (w, w_scale) = quantize_rows(x), quantize_rows(weight)
        ctx.save_for_backward(x, w, w_scale)
        ctx.dtype = weight.dtype
        y: Tensor = int8_product(a, w, a_scale, w_scale, x.dtype)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """grad (R, N) -> (R, K) and (N, K).

        The weight's scales go into grad, so that its int8 numbers are those of the forward pass.
        """
        x, w, w_scale = ctx.saved_tensors
        g, g_scale = quantize_rows(grad.float() * w_scale.t())
        ones = torch.ones_like(w_scale[:1]).expand(w.size(1), 1)
        dx = int8_product(g, w.t().contiguous(), g_scale, ones, x.dtype)
        return dx, (grad.t() @ x).to(ctx.dtype)


class DynamicInt8Linear(nn.Linear):
    """A linear layer that learns in int8. What it has learned is used as any other's."""

    def forward(self, input: Tensor) -> Tensor:
        """input (..., K) -> (..., N)."""
        if not self.training:
            return F.linear(input, self.weight, self.bias)
        rows = input.flatten(0, -2).to(compute_dtype(input))
        y: Tensor = Product.apply(rows, self.weight)  # type: ignore[no-untyped-call]
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.view(*input.shape[:-1], -1)


def learn_in_int8(model: GPT) -> None:
    """Have the blocks' linear layers learn in int8. Parameters and their names stay.

    Raises ValueError for layers so wide that int32 does not hold their sums.
    """
    for module in model.layers.modules():
        if isinstance(module, nn.Linear):
            if (most := max(module.in_features, module.out_features)) > MOST_TERMS:
                raise ValueError(
                    f"int8 takes layers of at most {MOST_TERMS:,} numbers, not {most:,}"
                )
            module.__class__ = DynamicInt8Linear


def shapes_of(model: GPT) -> list[tuple[int, ...]]:
    """(N, K) of the products in int8, forward and backward, each once."""
    linear = (m.weight.shape for m in model.layers.modules() if isinstance(m, nn.Linear))
    return sorted({turned for shape in linear for turned in (tuple(shape), tuple(shape)[::-1])})


# ---------------------------------------------------------------- as a setting


def why_not(device: torch.device, card: cards.Card | None) -> str:
    """Why a device, or a card that is planned for, cannot learn in int8; "" when it can."""
    if device.type == "mps":
        return "there is no kernel for mps"
    if device.type == "cpu":
        return ""
    needed = "Triton needs compute capability 8.0 for it, an RTX 30 or newer"
    if card:
        return "" if card.int8_times else f"{needed}, not a {card.name}"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"{needed}, not {major}.{minor}"
    return "" if importlib.util.find_spec("triton") else "it needs Triton: pip install triton"


def check(wanted: str, device: torch.device, compiled: str, card: cards.Card | None = None) -> None:
    """Says where matmul_dtype gains little; raises ValueError where it cannot be had.

    compiled: the setting compile. card: one that is planned for and not here.
    """
    if wanted == "auto":
        return
    if why := why_not(device, card):
        raise ValueError(f"matmul_dtype={wanted!r}, but {why}; leave it out, or write auto")
    card, text = card or cards.card_of(device), ""
    if device.type == "cpu":
        text = "gains nothing on a CPU: it is made for GeForce cards"
    elif compiled.lower() == "false":
        text = "gains little without torch.compile; write --compile=auto"
    elif card and card.int8_times < 4:
        name = cards.short_name(card.name)
        text = (
            f"may gain nothing: for it the {name} has {card.int8_times} times the rate of 16 bits, "
            "a GeForce card 4 times"
        )
    elif not card and "GeForce" not in (name := torch.cuda.get_device_name(device)):
        text = f"may gain nothing: the rate that a {name} has for it is not known"
    if text:
        say(f"WARNING  matmul_dtype={wanted} {text}")


def begin(wanted: str, model: GPT, dtype: torch.dtype) -> None:
    """Have a model, on its device, learn as matmul_dtype says.

    On a GPU the tiles of its products are chosen now, by time, while there is memory for it.
    Raises ValueError when that fails.
    """
    if wanted == "auto":
        return
    learn_in_int8(model)
    device, begun = model.cos.device, time.perf_counter()
    if device.type != "cuda":
        return
    shapes = shapes_of(model)
    try:
        for n, k in shapes:
            a, b = (torch.zeros(rows, k, dtype=torch.int8, device=device) for rows in (ROWS, n))
            int8_product(a, b, a[:, :1].float(), b[:, :1].float(), dtype)
    except Exception as e:  # whatever a compiler or a driver may raise
        why = named_reason(e)[:120]
        raise ValueError(f"matmul_dtype={wanted!r} fails here ({why}); leave it out") from e
    release_memory(device)
    say(f"int8     tiles of {len(shapes)} products chosen in {time.perf_counter() - begun:.0f} s")
