"""From a model to text: the loop that adds a token at a time, and the draw of each token.

Letters used for shapes are model.py's: B batch, T positions, V vocab_size.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

MIN_CACHE = 128  # positions
SMALL, LARGE = 1e-30, 1e30  # settings beyond act like these: in float32 they would be 0 or infinite


class Model(Protocol):
    """What `stream` asks of a model; GPT has it."""

    config: Any

    def new_cache(self, batch: int, length: int) -> Any: ...
    def prefill(self, idx: Tensor, cache: Any, pad: Tensor | None) -> Tensor: ...
    def decode(self, idx: Tensor, position: Tensor, cache: Any, pad: Tensor) -> Tensor: ...


@torch.no_grad()
def stream(
    model: Model,
    idx: Tensor,
    max_new_tokens: int,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    stop_tokens: Sequence[int] = (),
    lengths: Tensor | None = None,
    vocab_size: int | None = None,
    never: Sequence[int] = (),
    generator: torch.Generator | None = None,
    use_cache: bool = True,
) -> Iterator[Tensor]:
    """Yield the next token of every row, (B,) int64, up to max_new_tokens times.

    idx (B, T) int64, T >= 1. Prompts of different lengths stand at the right, padded at the left
    (see `left_pad`); lengths (B,) counts each row's real tokens. A row that has produced one of
    stop_tokens repeats it; when all rows have, the iteration ends. Ids from vocab_size on (padding
    of the embedding) and those in `never` are never drawn. Settings are as in `next_token`.

    Text longer than the context goes on in a window that slides by half the context; rows of
    different lengths slide together. Nothing is read back from the device but, with stop_tokens,
    whether all rows have ended.
    Raises ValueError for a setting out of range or an empty prompt.
    """
    B, T = idx.shape
    check_sampling(temperature, top_k, top_p, min_p, repetition_penalty)
    if T == 0 or max_new_tokens < 0:
        raise ValueError(f"a prompt of {T} tokens and {max_new_tokens} new ones make no text")
    device, context = idx.device, model.config.max_position_embeddings
    ids = torch.cat((idx, idx.new_zeros(B, max_new_tokens)), dim=1)
    pad = torch.zeros_like(idx[:, 0]) if lengths is None else T - lengths.to(device)
    seen = None
    if repetition_penalty != 1:
        is_prompt = torch.arange(T, device=device) >= pad[:, None]  # (B, T)
        counts = torch.zeros(B, model.config.vocab_size, dtype=torch.int32, device=device)
        seen = (counts.scatter_add_(1, idx, is_prompt.int()) > 0)[:, :vocab_size]
    stops = torch.tensor(list(stop_tokens), dtype=torch.int64, device=device)
    left_out = torch.tensor(list(never), dtype=torch.int64, device=device)
    done = torch.zeros(B, dtype=torch.bool, device=device)
    cache, start, token = None, -1, idx[:, -1]
    for n in range(T, T + max_new_tokens):
        new_start = window_start(n, context)
        if cache is None or new_start != start or not use_cache:
            if cache is None:
                cache = model.new_cache(B, cache_length(T + max_new_tokens, context))
            start = new_start
            visible_pad = pad - start
            position = torch.tensor([n - start], device=device)  # of the next token in the cache
            padded = None if lengths is None else visible_pad
            logits = model.prefill(ids[:, start:n], cache, padded)
        else:
            logits = model.decode(token[:, None], position, cache, visible_pad)
            position += 1
        logits = logits[:, :vocab_size]
        token = next_token(
            logits.index_fill(1, left_out, -math.inf) if len(left_out) else logits,
            temperature,
            top_k,
            top_p,
            min_p,
            repetition_penalty,
            seen,
            generator,
        )
        if len(stops):
            token = torch.where(done, ids[:, n - 1], token)
        ids[:, n] = token
        if seen is not None:
            seen.scatter_(1, token[:, None], True)
        yield token
        if len(stops):
            done |= torch.isin(token, stops)
            if bool(done.all()):
                return


def cache_length(length: int, context: int) -> int:
    """Positions to make room for when a text is to have `length` tokens.

    A power of two or 1.5 times one, so that texts of similar lengths share a compiled graph
    while short ones do not pay for the whole context; at least MIN_CACHE, at most the context.
    """
    power = 1 << (length - 1).bit_length()
    less = power // 4 * 3
    return min(context, max(MIN_CACHE, less if length <= less else power))


def window_start(length: int, context: int) -> int:
    """First token that is visible when the next of `length` tokens is predicted.

    0 while the text fits; past that the window moves by half the context at a time, so that the
    cache is rebuilt once in context/2 tokens and not at every token.
    """
    half = max(1, context // 2)
    return max(0, math.ceil((length - context) / half)) * half


def left_pad(prompts: Sequence[Sequence[int]], pad: int = 0) -> tuple[Tensor, Tensor]:
    """Prompts as one (B, T) int64 tensor, each at the right of its row, and their lengths (B,)."""
    width = max(len(p) for p in prompts)
    rows = [[pad] * (width - len(p)) + list(p) for p in prompts]
    return torch.tensor(rows), torch.tensor([len(p) for p in prompts])


def check_sampling(
    temperature: float, top_k: int | None, top_p: float, min_p: float, repetition_penalty: float
) -> None:
    """Raises ValueError that lists every sampling setting out of range."""
    problems = []
    if not 0 <= temperature < math.inf:
        problems.append(f"temperature must be 0 (greedy) or more, not {temperature}")
    if top_k is not None and top_k < 0:
        problems.append(f"top_k must be 0 (off) or more, not {top_k}")
    if not 0 < top_p <= 1:
        problems.append(f"top_p must be above 0 and at most 1 (off), not {top_p}")
    if not 0 <= min_p <= 1:
        problems.append(f"min_p must be at least 0 (off) and at most 1, not {min_p}")
    if not 0 < repetition_penalty < math.inf:
        problems.append(f"repetition_penalty must be positive, not {repetition_penalty}")
    if problems:
        raise ValueError("sampling settings: " + "; ".join(problems))


def penalize(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens already in the text less likely (arXiv 1909.05858). (B, V), seen (B, V) bool."""
    penalty = min(max(penalty, SMALL), LARGE)
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Only the k likeliest of each row stay; the rest become -inf. (B, V) -> (B, V)."""
    kth = logits.topk(min(k, logits.size(-1))).values[:, -1:]
    return logits.masked_fill(logits < kth, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """The fewest tokens whose probabilities reach p stay (arXiv 1904.09751). (B, V) -> (B, V)."""
    ordered, order = logits.sort(descending=True)
    probs = ordered.softmax(-1)
    before = probs.cumsum(-1) - probs  # mass of the likelier tokens: 0 for the first, always kept
    drop = before >= max(p, SMALL)
    return logits.masked_fill(drop.scatter(-1, order, drop), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Tokens at least p times as likely as the likeliest stay (arXiv 2407.01082)."""
    return logits.masked_fill(logits < logits.amax(-1, keepdim=True) + math.log(p), -math.inf)


def next_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    min_p: float = 0.0,
    repetition_penalty: float = 1.0,
    seen: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw one token a row: logits (B, V) -> (B,) int64.

    In order: repetition penalty on the `seen` (B, V) tokens, temperature (0 takes the likeliest),
    top-k, top-p, min-p, one draw. 0, None and 1 switch a step off.
    """
    logits = logits.float()
    if repetition_penalty != 1 and seen is not None:
        logits = penalize(logits, seen, repetition_penalty)
    if temperature < SMALL:
        return logits.argmax(-1)
    # the largest first becomes 0: a tiny temperature then gives -inf beside it, never inf - inf
    logits = (logits - logits.amax(-1, keepdim=True)) / min(temperature, LARGE)
    if top_k:
        logits = keep_top_k(logits, top_k)
    if top_p < 1:
        logits = keep_top_p(logits, top_p)
    if min_p > 0:
        logits = keep_min_p(logits, min_p)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator).squeeze(1)
