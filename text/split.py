"""The one rule of the split: which documents are for validation, and where either split's lie.

data/prepare.py writes train.bin and val.bin by it, and parts that are not merged are read by it.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


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


def split_parts(lengths: list[Ints], fraction: float, seed: int) -> Split:
    """The split of a source whose parts hold documents of `lengths` tokens, (documents,) a part.

    Training documents stay in the source's order: the loader shuffles.
    """
    first = np.cumsum([0] + [len(part) for part in lengths])  # document of each part, and the end
    edges = np.concatenate([[0], np.cumsum(np.concatenate(lengths))])  # tokens before a document
    chosen = val_documents(int(first[-1]), fraction, seed)
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
