"""Batches from token files: which tokens a step sees is a pure function of (seed, step).

An epoch cuts the token stream into windows of `context` tokens, with a fresh phase, and visits
each once in a keyed random order that takes no memory. Step s of a run takes the next
tokens_per_step / context windows, whatever the micro-batch size and the number of ranks are, so
nothing about the data needs saving but the step.
"""

import math
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from text.packing import Conversations
from text.shuffle import key_of as key_of  # for train.py, too
from text.shuffle import permute
from text.tokens import BEGINS, ID, Ints, TokenData, read_meta

BLOCK = 4096  # windows whose places in the stream are worked out together
IGNORED = -1  # a target that does not count: the model's IGNORE_INDEX


@dataclass(frozen=True)
class TrainOrder:
    """Which windows of the training stream a step takes."""

    tokens: int  # in the stream
    context: int
    tokens_per_step: int
    seed: int
    packed: int = 0  # windows of conversations; 0 = of a stream, cut with a phase

    @property
    def windows_per_epoch(self) -> int:
        """Windows that fit whatever the phase is: at least 1."""
        return self.packed or max(1, (self.tokens - self.context) // self.context)

    def epochs(self, steps: int) -> float:
        """How often `steps` steps go through the data."""
        return steps * self.tokens_per_step / self.context / self.windows_per_epoch

    def starts(self, step: int, first: int, count: int) -> Ints:
        """First tokens of the step's windows first .. first + count - 1: (count,).

        Packed windows are told by their numbers.
        """
        n = self.windows_per_epoch
        index = step * (self.tokens_per_step // self.context) + first + np.arange(count)
        starts = np.empty(count, dtype=np.int64)
        for epoch in np.unique(index // n):
            here = index // n == epoch
            key = key_of(self.seed, int(epoch))
            starts[here] = permute(index[here] % n, n, key)
            if not self.packed:
                phases = min(self.context, self.tokens - n * self.context)
                starts[here] = starts[here] * self.context + key % phases
        return starts


def open_split(folder: Path, split: str, context: int, vocab_size: int) -> TokenData:
    """A split of a dataset's folder: a stream of text, or conversations. Raises as they do."""
    if "chat" in read_meta(folder):
        return Conversations(folder, split, context, vocab_size)
    return TokenData(folder, split, context, vocab_size)


def order_of(data: TokenData, tokens_per_step: int, seed: int) -> TrainOrder:
    """The order in which a run takes the windows of its training data."""
    packed = data.count if data.packed else 0
    return TrainOrder(data.tokens, data.context, tokens_per_step, seed, packed)


def split_windows(tokens: Tensor, packed: bool = False) -> tuple[Tensor, ...]:
    """(B, T + 1) int16 or int32 -> inputs and targets, (B, T) int64, two views of one tensor.

    The integers travel narrow, a quarter of the bytes over the bus, and signed, since torch has
    few operations on unsigned types; the mask makes them the unsigned ids that they are.

    packed: of conversations, where the sign is COUNTS, and a target without it is IGNORED. The
    third is the number of a token's conversation in its window then, (B, T) int64.
    """
    if packed:
        ids = tokens.long() & ID
        segments = (tokens & BEGINS > 0).cumsum(1)
        return ids[:, :-1], torch.where(tokens < 0, ids, IGNORED)[:, 1:], segments[:, :-1]
    bits = 8 * tokens.element_size()
    if tokens.is_cpu:  # which can read them as unsigned, in two thirds of the time
        wide = tokens.view({16: torch.uint16, 32: torch.uint32}[bits]).long()
    else:
        wide = tokens.long().bitwise_and_(2**bits - 1)
    return wide[:, :-1], wide[:, 1:]


def host_tensor(windows: NDArray[Any], device: torch.device) -> Tensor:
    """The same bits in signed integers on the host, pinned when they go to CUDA."""
    tokens = torch.from_numpy(windows.view(f"i{windows.itemsize}"))
    return tokens.pin_memory() if device.type == "cuda" else tokens


class TrainLoader:
    """Micro-batches of a rank, the next one read by a thread while this one is used."""

    def __init__(
        self, data: TokenData, order: TrainOrder, rank: int, ranks: int, device: torch.device
    ) -> None:
        self.data, self.order, self.device = data, order, device
        self.rank, self.ranks = rank, ranks
        # the current GPU is each thread's own, and pinning would else open a context on the first
        on_gpu = (lambda: torch.cuda.set_device(device)) if device.type == "cuda" else None
        self.thread = ThreadPoolExecutor(1, "prefetch", initializer=on_gpu)
        self.block: tuple[int, Ints] = (-1, np.zeros(0, dtype=np.int64))
        self.pending: tuple[tuple[int, int, int], Future[Tensor]] | None = None

    def starts(self, step: int, first: int, count: int) -> Ints:
        """As order.starts, out of a block of steps done at once: a small array costs as much."""
        windows = self.order.tokens_per_step // self.order.context
        steps = max(1, BLOCK // windows)
        number, at = step // steps, step % steps * windows + first
        block = self.block  # the prefetching thread may replace it meanwhile
        if block[0] != number:
            block = (number, self.order.starts(number * steps, 0, steps * windows))
            self.block = block
        return block[1][at : at + count]

    def read(self, step: int, micro_step: int, batch_size: int) -> Tensor:
        """Windows (B, T + 1) in signed integers on the host, pinned when they go to CUDA."""
        first = (micro_step * self.ranks + self.rank) * batch_size
        return host_tensor(self.data.windows(self.starts(step, first, batch_size)), self.device)

    def batch(self, step: int, micro_step: int, batch_size: int) -> tuple[Tensor, ...]:
        """As split_windows, on the device; a pure function of the arguments."""
        wanted = (step, micro_step, batch_size)
        if self.pending is not None and self.pending[0] == wanted:
            tokens = self.pending[1].result()
        else:
            tokens = self.read(*wanted)
        windows_per_step = self.order.tokens_per_step // self.order.context
        micro_steps = windows_per_step // (batch_size * self.ranks)
        following = (*divmod(step * micro_steps + micro_step + 1, micro_steps), batch_size)
        self.pending = (following, self.thread.submit(self.read, *following))
        return split_windows(tokens.to(self.device, non_blocking=True), self.data.packed)

    def divisor(self, step: int, micro_step: int, batch_size: int) -> float:
        """What the mean loss of a rank's micro-batch is divided by, so that the sum of all is the
        mean over the step, times the ranks, whose gradients are averaged.

        The number of micro-batches, where all tokens count; else as the counted tokens weigh.
        """
        windows = self.order.tokens_per_step // self.order.context
        if not isinstance(self.data, Conversations):
            return windows // (batch_size * self.ranks)
        first = (micro_step * self.ranks + self.rank) * batch_size
        mine, all_ = (
            self.data.counts[self.starts(step, at, count)].sum()
            for at, count in ((first, batch_size), (0, windows))
        )
        return float(all_ / (mine * self.ranks)) if mine else math.inf


def eval_batches(
    data: TokenData,
    windows: int,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    ranks: int = 1,
) -> Iterator[tuple[Tensor, ...]]:
    """The same disjoint windows of a split at every call, as split_windows has them.

    At most `windows` of them, spread evenly over the split; ranks take turns, and have as many
    batches as each other. A last batch that is not full is filled up with windows whose targets
    are all IGNORED, so that there is one shape.
    """
    chosen = data.eval_starts(windows)
    starts = chosen[rank::ranks]
    for i in range(0, -(-len(chosen) // ranks), batch_size):
        rows = data.windows(np.resize(starts[i : i + batch_size], batch_size))
        tokens = host_tensor(rows, device).to(device, non_blocking=True)
        # y in memory of its own, but with the strides that training's has, for the compiler
        (x, _, *segments), (_, y, *_) = (split_windows(tokens, data.packed) for _ in range(2))
        y[len(starts) - i :] = IGNORED
        yield (x, y, *segments)
