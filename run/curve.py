"""A curve of validation losses to compare a run with, such as the original run's."""

import bisect
import math
from dataclasses import dataclass
from pathlib import Path

from run.records import read_records
from text.files import path_of

ROOT = Path(__file__).resolve().parent.parent
CLOSE = 2.0  # times as many tokens: points no further apart are interpolated between


@dataclass(frozen=True)
class Curve:
    """Losses in nats per token by tokens seen, in rising order."""

    tokens: list[int]
    losses: list[float]

    def at(self, tokens: int) -> float | None:
        """The loss at a point of the curve, or between two that are close; else None.

        Straight in the logarithm of the tokens.
        """
        i = bisect.bisect_left(self.tokens, tokens)
        if i < len(self.tokens) and self.tokens[i] == tokens:
            return self.losses[i]
        if not 0 < i < len(self.tokens):
            return None
        a, b = self.tokens[i - 1], self.tokens[i]
        if a <= 0 or b > CLOSE * a:
            return None
        share = math.log(tokens / a) / math.log(b / a)
        return self.losses[i - 1] + share * (self.losses[i] - self.losses[i - 1])


def read_curve(name: str) -> Curve | None:
    """The evaluations in a metrics.jsonl, of any run; None for an empty name.

    A path that is not there is looked for in the repository. Raises ValueError or OSError.
    """
    if not name:
        return None
    path = path_of(name)
    if not path.is_file() and (ROOT / name).is_file():
        path = ROOT / name
    if not path.is_file():
        raise FileNotFoundError(f"there is no curve {name}; write --reference=PATH of a .jsonl")
    lines = [r for r in read_records(path) if isinstance(r, dict)]
    found = {r["tokens"]: r["val_loss"] for r in lines if {"tokens", "val_loss"} <= r.keys()}
    if not found:
        raise ValueError(f"{path} has no lines with tokens and val_loss, as metrics.jsonl has them")
    points = sorted(found.items())
    return Curve([int(t) for t, _ in points], [float(v) for _, v in points])
