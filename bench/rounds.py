"""Ways to do a thing, in turn, A B A B: what else the machine does meets them all alike."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TypeVar

T = TypeVar("T")


def in_turn(ways: Mapping[str, Callable[[], T]], repeats: int) -> Iterator[tuple[str, str, T]]:
    """Each way `repeats` times: the round, as 2/3, the way's name, and what it has returned."""
    for i in range(repeats):
        for name, way in ways.items():
            yield f"{i + 1}/{repeats}", name, way()


def median(found: Iterable[float]) -> float:
    """The median; NaN of nothing, as an interrupted measurement has."""
    numbers = list(found)
    return statistics.median(numbers) if numbers else math.nan


def ratio(a: Iterable[float], b: Iterable[float]) -> float:
    """The median of a / b over the rounds that both have."""
    return median(x / y for x, y in zip(a, b, strict=False))
