"""What an evaluation looks at: the loss on the same windows every time, and a text."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from making.sampling import stream
from model import GPT, IGNORE_INDEX
from run.log import say
from run.machine import Machine, is_oom
from run.team import Team
from text.batches import eval_batches
from text.chat import never, question_ids
from text.files import reason
from text.tokenizer import Tokenizer
from text.tokens import TokenData

SAMPLE_TOKENS = 100


@dataclass(frozen=True)
class Evaluation:
    """Which windows an evaluation reads; ranks take turns."""

    data: TokenData
    windows: int
    device: torch.device
    team: Team

    @property
    def count(self) -> int:
        """How many there are to read: a small validation split has fewer than are asked for."""
        return min(self.windows, self.data.count)

    def line(self, eval_iters: int) -> str:
        """How many are read, for people, and why so many."""
        asked = "eval_iters x batch_size" if eval_iters else f"not {self.windows}"
        why = asked if self.count == self.windows else f"all that there are, {asked}"
        return f"{self.count:,} windows in an evaluation: {why}"

    def batches(self, size: int) -> Iterator[tuple[Tensor, ...]]:
        """Inputs, targets and what split_windows adds, `size` windows at a time."""
        t = self.team
        return eval_batches(self.data, self.windows, size, self.device, t.rank, t.ranks)


def sample_text(model: GPT, tok: Tokenizer, prompt: str, machine: Machine) -> str:
    """The prompt and up to SAMPLE_TOKENS more tokens, by random numbers of its own.

    The same numbers each time, and those of the run are not touched. To a model that answers, the
    prompt is a question.
    """
    ids = question_ids(tok, prompt)[-model.config.max_position_embeddings :]
    generator = torch.Generator(machine.device).manual_seed(0)
    how: dict[str, Any] = {"temperature": 0.8, "top_k": 50, "vocab_size": tok.vocab_size}
    how["never"] = never(tok, tok.chat is not None)
    model.eval()
    try:
        x = torch.tensor([ids], device=machine.device)
        with machine.autocast:
            made = [int(t) for t in stream(model, x, SAMPLE_TOKENS, generator=generator, **how)]
    except Exception as e:  # a text is not worth a run
        if not is_oom(e):
            raise
        made = []
        say(f"no text: {reason(e)[:120]}")
    model.train()
    end = next((i for i, token in enumerate(made) if token in tok.ends), len(made))
    return prompt + (" -> " if tok.chat else "") + tok.decode(made[:end])


@torch.no_grad()
def loss_sums(model: GPT, batches: Iterable[tuple[Tensor, ...]], autocast: Any) -> Tensor:
    """Sum of losses in nats, and number of tokens, over all batches: (2,) float64 on the CPU.

    With dropout off and one wait for the device.
    """
    model.eval()
    losses = []
    for batch in batches:
        with autocast:
            _, loss = model(*batch, loss_only=True)
        losses.append(torch.stack((loss.float(), (batch[1] != IGNORE_INDEX).sum().float())))
    model.train()
    if not losses:
        return torch.zeros(2, dtype=torch.float64)
    mean, tokens = torch.stack(losses).cpu().double().unbind(1)  # mps has no float64
    return torch.stack(((mean * tokens).sum(), tokens.sum()))
