"""The optimizer, and the learning rate of each update."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from formats.pack import gathered


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each update: linear warm-up, then a cosine from `peak` to `low`."""

    peak: float
    low: float
    warmup: int  # updates
    decay: int  # update at which `low` is reached

    def at(self, step: int) -> float:
        """The rate of update `step`, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if step >= self.decay:
            return self.low
        done = (step - self.warmup) / (self.decay - self.warmup)
        return self.low + 0.5 * (1 + math.cos(math.pi * done)) * (self.peak - self.low)


def make_schedule(peak: float, low: float, warmup: int, decay: int) -> Schedule:
    """The schedule of the settings. A warm-up beyond the decay's end is cut to a tenth of it.

    So that a try of any run with a few updates just runs.
    """
    return Schedule(peak, low, decay // 10 if warmup > decay else warmup, decay)


def configure_optimizer(
    model: nn.Module, learning_rate: float, betas: tuple[float, float], weight_decay: float
) -> torch.optim.AdamW:
    """AdamW, fused; weight decay on tensors of 2 or more dimensions: no norms or biases."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in params if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in params if p.dim() < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, betas: tuple[float, float], weight_decay: float
) -> None:
    """Give an optimizer of configure_optimizer what is set now, whatever a checkpoint has saved."""
    for group, decay in zip(optimizer.param_groups, (weight_decay, 0.0), strict=True):
        group.update(weight_decay=decay, betas=betas)


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients so that their norm is at most `largest` (0: any); the norm before, ().

    Where ranks have parts of the gradients they exchange what the norm takes.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    return gathered(norm)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next update."""
    for group in optimizer.param_groups:
        group["lr"] = rate
