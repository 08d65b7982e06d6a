"""The one rule of the split: which documents are for validation, and where either split's lie.

data/prepare.py writes train.bin and val.bin by it, and parts that are not merged are read by it.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]

MANY = 1000  # documents from which on the split is nanoGPT's, whatever they weigh
LEAST = 100  # tokens for validation below which no document is cut for their sake
SMALL_SHARE = 0.01  # of the tokens, which validation may have whatever was asked for


class Split(NamedTuple):
    """Where the tokens of both splits lie: rows of part, first token in the part, and end."""

    chosen: Ints  # (validation documents,): their numbers in the source, in val.bin's order
    val: Ints  # (validation documents, 3), in val.bin's order
    train: Ints  # (runs, 3): neighbours of one part together, in the source's order


def val_share(documents: int, fraction: float) -> float:
    """The fraction of the documents for validation; 0 asks for nanoGPT's, or more of a few."""
    return fraction or (0.0005 if documents >= 100_000 else 0.05)


def val_documents(documents: int, fraction: float, seed: int) -> Ints:
    """Which documents (of two or more) are for validation, in val.bin's order.

    As datasets.train_test_split(test_size=fraction, seed=seed, shuffle=True) chooses them, but
    that neither split is ever empty.
    """
    order = np.random.default_rng(seed).permutation(documents)
    return order[: min(max(1, math.ceil(fraction * documents)), documents - 1)]


def is_uneven(lengths: Ints, chosen: Ints, fraction: float) -> bool:
    """Whether the chosen documents have far more or less than their share of the tokens."""
    share = lengths[chosen].sum() / lengths.sum()
    return bool(share > max(2 * fraction, SMALL_SHARE) or share < fraction / 2)


def cut_at(lengths: Ints, fraction: float, seed: int) -> int:
    """Where a source of few and very unequal documents is cut by tokens; 0: split by documents.

    lengths: tokens of each document. What follows that many tokens of the source is for
    validation. It is the nearest edge between two documents, where there is one near.
    """
    documents = len(lengths)
    total = int(lengths.sum()) - documents  # without end-of-text
    wanted = math.ceil(fraction * total)
    if documents > 1:
        if documents >= MANY or wanted < LEAST:
            return 0
        if not is_uneven(lengths, val_documents(documents, fraction, seed), fraction):
            return 0
    edges = np.cumsum(lengths)[:-1]
    off = np.abs(edges - (total - wanted))
    nearest = int(off.argmin()) if len(edges) else 0
    return int(edges[nearest]) if len(edges) and off[nearest] <= wanted / 2 else total - wanted


def split_parts(
    lengths: list[Ints], fraction: float, seed: int, val_from: int | None = None
) -> Split:
    """The split of a source whose parts hold documents of `lengths` tokens, (documents,) a part.

    val_from: the first of the parts that are for validation as they are; None: it is chosen.
    Training documents stay in the source's order: the loader shuffles.
    """
    first = np.cumsum([0] + [len(part) for part in lengths])  # document of each part, and the end
    edges = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])  # tokens before a document
    if val_from is None:
        chosen = val_documents(int(first[-1]), fraction, seed)
    else:
        chosen = np.arange(first[val_from], first[-1])
    cuts = np.unique(np.concatenate([chosen, chosen + 1, first]))
    kept = ~np.isin(cuts[:-1], chosen)
    val = in_parts(chosen, chosen + 1, first, edges)
    return Split(chosen, val, in_parts(cuts[:-1][kept], cuts[1:][kept], first, edges))


def in_parts(begins: Ints, ends: Ints, first: Ints, edges: Ints) -> Ints:
    """Documents begin .. end - 1, (n,), none of it beyond its part, as (n, 3) rows of a Split.

    first: the first document of each part; edges: tokens of the source before each document.
    """
    parts = np.searchsorted(first, begins, side="right") - 1
    before = edges[first[parts]]
    return np.stack([parts, edges[begins] - before, edges[ends] - before], axis=1)
