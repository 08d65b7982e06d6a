"""How likely a model finds texts: log-likelihoods of answers after contexts, in batches.

Each context is computed once, whatever the number of answers, and the head only where it counts.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from text.tokenizer import Tokenizer

Ids = NDArray[Any]  # of integers

HEAD_ROWS = 1024  # positions whose logits are in memory at once: 200 MB for GPT-2's vocabulary


class Model(Protocol):
    """What scoring asks of a model; GPT has it."""

    embed_tokens: Any
    norm: Any
    lm_head: Any

    def at(self, slots: Tensor, cache: Any, mask: Tensor | None) -> Any: ...
    def walk(self, x: Tensor, at: Any) -> Tensor: ...


class Question(NamedTuple):
    """Token ids to read, and continuations to score, which do not see each other."""

    context: Ids  # at least one
    answers: list[Ids]  # at least one id in each

    def length(self) -> int:
        """Positions that the model computes for it."""
        return len(self.context) + sum(len(a) - 1 for a in self.answers)


class Score(NamedTuple):
    """Of an answer."""

    loglikelihood: float  # sum over its tokens, in nats
    greedy: bool  # whether each of its tokens is the likeliest at its place


def encode_pair(tok: Tokenizer, context: str, answer: str) -> tuple[list[int], list[int]]:
    """The ids of a context and those that an answer adds to them, tokenized as one text.

    Blanks at the context's end count to the answer; an empty context is a document's start.
    """
    head = context.rstrip()
    answer = context[len(head) :] + answer
    if not head:
        return tok.prompt(""), tok.encode(answer)
    ids = tok.encode(head)
    return ids, tok.encode(head + answer)[len(ids) :]


def ask(tok: Tokenizer, context: str, answers: Sequence[str], window: int) -> list[Question]:
    """A text and its continuations as a question, or as one for each.

    For a context that does not fit in the model's window with an answer (whose last id is not read)
    is cut at its left, and then differs from answer to answer. Raises ValueError when an answer
    alone does not fit.
    """
    pairs = []
    for ids, answer in (encode_pair(tok, context, a) for a in answers):
        if not 0 < len(answer) <= window:
            raise ValueError(
                f"an answer of {len(answer)} tokens; the model's context takes 1 to {window}"
            )
        pairs.append((np.array(ids[-(window + 1 - len(answer)) :]), np.array(answer)))
    if len({len(c) for c, _ in pairs}) == 1:
        return [Question(pairs[0][0], [a for _, a in pairs])]
    return [Question(c, [a]) for c, a in pairs]


def sliding(ids: Ids, window: int, step: int) -> list[Question]:
    """Questions that score each of ids (n,) but the first once, n > 1.

    The window moves by `step`, at most its length; the last one ends with the text. A token is
    scored with all that its first window shows.
    """
    last = max(0, len(ids) - 1 - window)  # first token of the last window
    questions, scored = [], 1
    for start in [*range(0, last, step), last]:
        end = min(start + window + 1, len(ids))
        questions.append(Question(ids[start:scored], [ids[scored:end]]))
        scored = end
    return questions


def pack(question: Question) -> tuple[Tensor, Tensor]:
    """A question as one row of the model, so that its context is computed once.

    The context and, one after another, all answers without their last ids. Returns for the row
    (ids, positions, segments) (3, T): positions go on from the context in each answer, and segments
    are 0 in the context and a number of its own in each of several answers. And for the answers
    (places in the row, ids to be predicted there) (2, N).
    """
    context, answers = question
    n, several = len(context), len(question.answers) > 1
    row = [np.stack([context.astype(np.int64), np.arange(n), np.zeros(n, np.int64)])]
    scored, at = [], n
    for i, answer in enumerate(answers, 1):
        more = len(answer) - 1
        where = np.concatenate([[n - 1], np.arange(at, at + more)])
        scored.append(np.stack([where, answer.astype(np.int64)]))
        segment = np.full(more, i if several else 0)
        row.append(np.stack([answer[:-1].astype(np.int64), np.arange(n, n + more), segment]))
        at += more
    return torch.from_numpy(np.concatenate(row, 1)), torch.from_numpy(np.concatenate(scored, 1))


def hidden_states(model: Model, ids: Tensor, positions: Tensor, segments: Tensor) -> Tensor:
    """The model's output before its head, (B, T, C); the arguments, each (B, T), are `pack`'s.

    A token sees those before it of its own segment and of segment 0.
    """
    mask = None
    if bool(segments.any()):
        before = torch.ones(ids.size(1), ids.size(1), dtype=torch.bool, device=ids.device).tril()
        seen, looking = segments[:, None, :], segments[:, :, None]
        mask = (((seen == 0) | (seen == looking)) & before)[:, None]  # (B, 1, T, T)
    at = model.at(positions, None, mask)  # tables (B, T, 1, hd)
    states: Tensor = model.norm(model.walk(model.embed_tokens(ids), at))
    return states


def token_scores(
    model: Model, questions: Sequence[Question], vocab_size: int, device: torch.device
) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    """Log-likelihood of each token of all answers, in order, and whether it is the likeliest."""
    packed = [pack(q) for q in questions]
    width = max(row.size(1) for row, _ in packed)
    rows = torch.stack([F.pad(row, (0, width - row.size(1))) for row, _ in packed])
    ids, positions, segments = rows.to(device).unbind(1)
    states = hidden_states(model, ids, positions, segments)
    line = torch.repeat_interleave(torch.tensor([s.size(1) for _, s in packed]))
    places, targets = torch.cat([s for _, s in packed], 1).to(device)
    wanted = states[line.to(device), places]  # (N, C)
    found = []
    for i in range(0, len(wanted), HEAD_ROWS):
        logits = model.lm_head(wanted[i : i + HEAD_ROWS])[:, :vocab_size].float()
        target = targets[i : i + HEAD_ROWS]
        own = logits.gather(1, target[:, None])[:, 0]
        greedy = logits.argmax(1) == target
        found.append(torch.stack([own - logits.logsumexp(1), greedy.float()]))
    values = torch.cat(found, 1).cpu().numpy()
    return values[0].astype(np.float64), values[1] > 0


def batches(lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Rows in batches of like lengths, the longest first, at most `most` positions in each."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > most:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


@torch.no_grad()
def score(
    model: Model,
    questions: Sequence[Question],
    vocab_size: int,
    most: int,
    done: Callable[[int], object] = lambda n: None,
) -> list[list[Score]]:
    """The scores of each question's answers.

    vocab_size: ids from there on are taken for impossible. most: positions in a batch. done is
    called with the positions of each batch that is finished.
    """
    device = model.embed_tokens.weight.device
    results: list[list[Score]] = [[] for _ in questions]
    lengths = [q.length() for q in questions]
    for batch in batches(lengths, most):
        chosen = [questions[i] for i in batch]
        values, greedy = token_scores(model, chosen, vocab_size, device)
        edges = np.cumsum([0, *(len(a) for q in chosen for a in q.answers)])
        scores = iter(
            Score(float(values[a:b].sum()), bool(greedy[a:b].all())) for a, b in pairwise(edges)
        )
        for i in batch:
            results[i] = [next(scores) for _ in questions[i].answers]
        done(sum(lengths[i] for i in batch))
    return results
