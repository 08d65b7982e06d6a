"""A curve of validation losses to compare a run with, such as the original run's."""

import bisect
import contextlib
import json
import math
from dataclasses import dataclass
from pathlib import Path

from text.files import path_of, read_text

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
    found: dict[int, float] = {}
    for number, line in enumerate(read_text(path).split("\n"), 1):
        record: object = None
        with contextlib.suppress(ValueError, RecursionError):  # one that a crash cut short
            record = json.loads(line)
        if isinstance(record, dict) and {"tokens", "val_loss"} <= record.keys():
            tokens, loss = record["tokens"], record["val_loss"]
            if type(tokens) is not int or not 0 <= tokens < 2**63 or not is_loss(loss):
                raise ValueError(
                    f"{path} line {number}: no curve goes through tokens {str(tokens)[:30]}, "
                    f"val_loss {str(loss)[:30]}; take that line out"
                )
            found[tokens] = float(loss)
    if not found:
        raise ValueError(f"{path} has no lines with tokens and val_loss, as metrics.jsonl has them")
    points = sorted(found.items())
    return Curve([t for t, _ in points], [v for _, v in points])


def is_loss(value: object) -> bool:
    """Whether a value is a finite number of at least 0."""
    return type(value) in (int, float) and 0 <= value < 1e30  # type: ignore[operator]
