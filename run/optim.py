"""The optimizer, and the learning rate of each update."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from formats.pack import gathered
from model import GPT
from run.muon import MOMENTUM, Muon


@dataclass(frozen=True)
class Schedule:
    """Learning rate of each update, a function of the step alone.

    A linear warm-up to `peak`, which stays until `fall`; then by a cosine, or a line, to `low`.
    """

    peak: float
    low: float
    warmup: int  # updates
    decay: int  # update at which `low` is reached
    fall: int = 0  # update at which the rate begins to fall; the warm-up's end if that is later
    line: bool = False

    def at(self, step: int) -> float:
        """The rate of update `step`, from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / (self.warmup + 1)
        if step >= self.decay:
            return self.low
        start = max(self.warmup, self.fall)
        done = max(0, step - start) / max(1, self.decay - start)
        left = 1 - done if self.line else 0.5 * (1 + math.cos(math.pi * done))
        return self.low + left * (self.peak - self.low)


def make_schedule(
    peak: float, low: float, warmup: int, decay: int, kind: str = "cosine", share: float = 1.0
) -> Schedule:
    """The schedule of the settings. A warm-up beyond the decay's end is cut to a tenth of it.

    So that a try of any run with a few updates just runs. share: how much of `decay` updates the
    rate of a `wsd` schedule (warm-up, stable, decay; arXiv 2404.06395) falls in.
    """
    warmup = decay // 10 if warmup > decay else warmup
    if kind == "cosine":
        return Schedule(peak, low, warmup, decay)
    return Schedule(peak, low, warmup, decay, decay - round(share * decay), line=True)


def schedule_of(settings: Mapping[str, Any]) -> Schedule:
    """The schedule that settings of train.py describe."""
    s = settings
    if not s["decay_lr"]:
        return Schedule(s["learning_rate"], s["learning_rate"], 0, 0)
    rates, decay = (s["learning_rate"], s["min_lr"]), s["lr_decay_iters"] or s["max_iters"]
    return make_schedule(*rates, s["warmup_iters"], decay, s["lr_schedule"], s["decay_share"])


def configure_optimizer(
    model: GPT,
    learning_rate: float,
    betas: tuple[float, float],
    weight_decay: float,
    name: str = "adamw",
    dtype: torch.dtype = torch.float32,
    muon_lr: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW, fused, or Muon, which takes the matrices inside the blocks and leaves it the rest.

    Weight decay is on tensors of 2 or more dimensions: no norms or biases. dtype: that of the run's
    matrix products; Muon's are in float32 unless it is bfloat16. muon_lr: the rate of its matrices
    while that of the rest is `learning_rate`; 0 = the same.
    """
    groups = groups_of(model, name)
    for group in groups:
        own = muon_lr if "momentum" in group else 0.0
        group["times"] = (own or learning_rate) / learning_rate
    if name == "muon":
        optimizer: torch.optim.AdamW = Muon(groups, learning_rate, betas, muon_dtype(dtype))
    else:
        optimizer = torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)
    set_hyperparameters(optimizer, betas, weight_decay)
    return optimizer


def muon_dtype(dtype: torch.dtype) -> torch.dtype:
    """What Muon's products run in, where a run's others run in `dtype`: float16 has no range."""
    return dtype if dtype == torch.bfloat16 else torch.float32


def groups_of(model: GPT, name: str) -> list[dict[str, Any]]:
    """A model's parameters in the groups of its optimizer; one with a momentum is Muon's."""
    params = [p for p in model.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.dim() >= 2]},
        {"params": [p for p in params if p.dim() < 2]},
    ]
    if name == "muon":
        inner = {id(p) for p in model.layers.parameters()}
        matrices = [p for p in groups[0]["params"] if id(p) in inner]
        groups[0]["params"] = [p for p in groups[0]["params"] if id(p) not in inner]
        groups.append({"params": matrices, "momentum": MOMENTUM})
    return groups


def set_hyperparameters(
    optimizer: torch.optim.Optimizer, betas: tuple[float, float], weight_decay: float
) -> None:
    """Give an optimizer of configure_optimizer what is set now, whatever a checkpoint has saved."""
    for group in optimizer.param_groups:
        decays = any(p.dim() >= 2 for p in group["params"])
        group.update(weight_decay=weight_decay if decays else 0.0, betas=betas)


def state_of(group: Mapping[str, Any], shape: Sequence[int] = (1, 1)) -> dict[str, Sequence[int]]:
    """What an optimizer keeps for a parameter of a group, by name, and its shape."""
    if "momentum" in group:
        return {"momentum_buffer": shape, "row_squares": shape[:1]}
    return {"step": (), "exp_avg": shape, "exp_avg_sq": shape}


def moments(groups: Iterable[Mapping[str, Any]]) -> int:
    """The numbers that an optimizer of these groups keeps: two a parameter, Muon one and a bit."""
    states = [state_of(group, p.shape) for group in groups for p in group["params"]]
    return sum(math.prod(shape) for state in states for shape in state.values() if len(shape))


def clip_gradients(model: nn.Module, largest: float) -> Tensor:
    """Scale all gradients so that their norm is at most `largest` (0: any); the norm before, ().

    Where ranks have parts of the gradients they exchange what the norm takes.
    """
    norm = nn.utils.clip_grad_norm_(model.parameters(), largest or math.inf)
    return gathered(norm)


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """The learning rate of the next update; Muon's own rate rises and falls with it."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["times"]
