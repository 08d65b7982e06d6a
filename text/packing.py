"""Conversations as windows: each begins with one, and holds as many whole ones as fit.

A token of a conversation is a uint32 of which three bits say more: whether it counts for the loss,
whether a conversation begins with it, whether a turn does that asks. A window may also begin with
the last: a conversation that is too long is cut there. Which pieces share a window depends on the
data and the context alone. Neighbours in the data, which may be about the same, do not share one
more often than others.
"""

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from text.shuffle import permute
from text.tokens import ASKS, BEGINS, COUNTS, ID, Ints, TokenData

KEY = 0  # of the order in which conversations of one length are packed
BLOCK = 2**22  # tokens that are looked at together


def marked(
    ids: NDArray[np.uint32], counts: NDArray[np.bool_], asks: NDArray[np.bool_]
) -> NDArray[np.uint32]:
    """A conversation's tokens with what is known of each: (tokens,), as the file has them."""
    found: NDArray[np.uint32] = ids | counts * np.uint32(COUNTS) | asks * np.uint32(ASKS)
    found[:1] |= np.uint32(BEGINS)
    return found


class Conversations(TokenData):
    """One split of conversations, packed into windows, which `windows` takes by their numbers.

    `counts` are the tokens of each window that count for the loss; `said` is a line for the user.
    Raises as TokenData, and for a split in which nothing counts.
    """

    packed = True

    def check(self, path: Path, meta: dict[str, Any]) -> None:
        """Pack the windows; the split may be shorter than one."""
        self.pad = int(meta["eot"])  # fills a window up
        if self.pad >= self.vocab_size:
            raise ValueError(self.too_large(self.pad, f"{path.parent / 'meta.json'}, as eot,"))
        begins = self.places(BEGINS)
        if not len(begins):
            raise ValueError(f"{path} holds no conversation; run data/prepare.py --chat=True again")
        found = pieces(begins, self.places(ASKS), self.tokens, self.context + 1)
        starts, lengths, cut, long = found
        # the first of a piece is not predicted
        counts = self.counted_before(starts + lengths) - self.counted_before(starts + 1)
        kept = np.flatnonzero(counts)
        if not len(kept):
            raise ValueError(
                f"{path} has no answer that begins within a context of {self.context} tokens; "
                "set a larger --max_position_embeddings, or prepare conversations with short "
                "questions"
            )
        kept = kept[np.argsort(permute(np.arange(len(kept)), len(kept), KEY))]
        window = pack(lengths[kept], self.context + 1)
        order = np.argsort(window, kind="stable")
        self.starts, self.lengths = starts[kept][order], lengths[kept][order]
        self.edges = np.searchsorted(window[order], np.arange(window.max() + 2))
        self.counts = np.add.reduceat(counts[kept][order], self.edges[:-1])
        asked = len(starts) - len(kept)
        self.said = (
            f"{len(begins):,} conversations in {self.count:,} windows, "
            f"{self.lengths.sum() / self.count / (self.context + 1):.0%} full; "
            f"{self.counts.sum():,} tokens count"
            + f"; {cut:,} conversations are cut at a turn" * bool(cut)
            + f"; {long:,} turns are longer than the context, their ends left out" * bool(long)
            + f"; {asked:,} pieces without an answer are left out" * bool(asked)
        )

    @property
    def count(self) -> int:
        """How many windows there are."""
        return len(self.counts)

    def places(self, mark: int) -> Ints:
        """Where in the stream tokens have a mark."""
        found = [np.zeros(0, np.int64)]
        for ids, begin in zip(self.ids, self.begins, strict=False):
            for at in range(0, len(ids), BLOCK):
                found.append(np.flatnonzero(ids[at : at + BLOCK] & np.uint32(mark)) + at + begin)
        return np.concatenate(found)

    def counted_before(self, places: Ints) -> Ints:
        """How many tokens of the stream count before each of the places."""
        found, order = np.empty(len(places), np.int64), np.argsort(places, kind="stable")
        ordered, total = places[order], 0
        for ids, begin in zip(self.ids, self.begins, strict=False):
            for at in range(begin, begin + len(ids), BLOCK):
                marks = ids[at - begin : at - begin + BLOCK] >> np.uint32(31)
                sums = total + np.concatenate([[0], np.cumsum(marks, dtype=np.int64)])
                here = slice(*np.searchsorted(ordered, [at, at + len(marks)]))
                found[order[here]] = sums[ordered[here] - at]
                total = int(sums[-1])
        found[order[np.searchsorted(ordered, self.tokens) :]] = total
        return found

    def eval_starts(self, windows: int) -> Ints:
        """At most so many windows, spread evenly over the split."""
        n = min(windows, self.count)
        return np.arange(n) * self.count // n

    def windows(self, starts: Ints, length: int | None = None) -> NDArray[np.uint32]:
        """The windows of these numbers: (n,) -> (n, context + 1), ids with COUNTS and BEGINS.

        Each piece begins with a token that BEGINS, which never counts: nothing before it is of its
        conversation. Raises ValueError as TokenData's.
        """
        found = np.full((len(starts), self.context + 1), self.pad, np.uint32)
        for number, row in zip(starts.tolist(), found, strict=True):
            at = 0
            for i in range(self.edges[number], self.edges[number + 1]):
                first, size = int(self.starts[i]), int(self.lengths[i])
                piece = row[at : at + size]
                self.read(first, piece)
                ids = piece & np.uint32(ID)
                if (largest := int(ids.max())) >= self.vocab_size:
                    self.refuse(largest, first + int(ids.argmax()))
                piece[0] = ids[0] | np.uint32(BEGINS)
                at += size
        found &= np.uint32(COUNTS | BEGINS | ID)
        return found


def pieces(begins: Ints, asks: Ints, tokens: int, room: int) -> tuple[Ints, Ints, int, int]:
    """First tokens and lengths of the pieces that fit in `room`, how many conversations are cut,
    and how many exchanges have lost their ends.

    begins: first tokens of conversations; asks: of turns that ask, those among them.
    """
    ends = np.append(begins[1:], tokens)
    short = ends - begins <= room
    cut = long = 0
    starts, lengths = [*begins[short].tolist()], [*(ends - begins)[short].tolist()]
    for begin, end in zip(begins[~short].tolist(), ends[~short].tolist(), strict=True):
        at = asks[np.searchsorted(asks, begin) : np.searchsorted(asks, end)]
        edges = np.unique([begin, *at.tolist(), end])
        cut += len(edges) > 2
        while begin < end:
            fits = edges[np.searchsorted(edges, begin + room, "right") - 1]
            stop = int(fits if fits > begin else edges[np.searchsorted(edges, begin, "right")])
            long += stop - begin > room
            starts.append(begin)
            lengths.append(min(room, stop - begin))
            begin = stop
    order = np.argsort(np.array(starts, np.int64), kind="stable")
    return np.array(starts, np.int64)[order], np.array(lengths, np.int64)[order], cut, long


def pack(lengths: Ints, room: int) -> Ints:
    """The window of each piece, (pieces,): the fullest that still takes it, the longest first."""
    window = np.empty(len(lengths), np.int64)
    waiting: list[list[int]] = [[] for _ in range(room + 1)]  # windows by what is free in them
    free, count = 0, 0  # free: bit n is set where a window has n free
    for i in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[i])
        fits = free >> length
        if fits:
            left = length + (fits & -fits).bit_length() - 1
            number = waiting[left].pop()
            if not waiting[left]:
                free ^= 1 << left
        else:
            left, number, count = room, count, count + 1
        window[i] = number
        waiting[left - length].append(number)
        free |= 1 << (left - length)
    return window
