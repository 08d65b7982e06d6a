"""The picture of a run: loss, learning rate, gradient norm and speed, from its metrics.jsonl."""

from pathlib import Path
from typing import Any

from run.curve import Curve
from run.records import Record, read_records
from text.files import named_reason

UNITS = ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k"))


def short(number: float, _: Any = None) -> str:
    """A number as people say it: 500k, 1.5M, 7.37B."""
    number = float(f"{number:.3g}")
    for unit, letter in UNITS:
        if abs(number) >= unit:
            return f"{number / unit:.3g}{letter}"
    return f"{number:.3g}"


def points(records: list[Record], key: str) -> tuple[list[float], list[float]]:
    """Tokens and values of the records that have a key."""
    has = (r for r in records if None not in (r.get("tokens"), r.get(key)))
    found = [(r["tokens"], r[key]) for r in has]
    return [x for x, _ in found], [y for _, y in found]


def draw_run(metrics: Path, image: Path, curve: Curve | None = None) -> str:
    """Draw the run into an image; why not, or "". curve: a run to compare with."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import FuncFormatter
    except ImportError:
        return f"no {image.name}: matplotlib is not installed"
    records = read_records(metrics)
    figure = Figure(figsize=(8, 8))
    axes = figure.subplots(4, 1, sharex=True, height_ratios=[4, 1, 1, 1.3])
    figure.subplots_adjust(left=0.14, right=0.92, bottom=0.07, top=0.98, hspace=0.12)
    loss, rate, norm, speed = axes
    loss.plot(*points(records, "loss"), lw=1, label="training")
    loss.plot(*points(records, "val_loss"), "o-", lw=1, ms=3, label="validation")
    if curve is not None:
        last = max(points(records, "tokens")[0], default=0)
        shown = [(t, v) for t, v in zip(curve.tokens, curve.losses, strict=True) if t <= last]
        loss.plot([t for t, _ in shown], [v for _, v in shown], "x--", c="0.4", label="reference")
    loss.set_ylabel("loss, nats per token")
    loss.legend()
    rate.plot(*points(records, "lr"), lw=1, c="C2")
    rate.set_ylabel("learning\nrate")
    rate.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    norm.plot(*points(records, "grad_norm"), lw=1, c="C3")
    norm.set_ylabel("gradient\nnorm")
    speed.plot(*points(records, "tokens_per_s"), lw=1, c="C4")
    speed.set_ylabel("tokens/s")
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(FuncFormatter(short))
    known = [r for r in records if r.get("mfu") and r.get("tokens_per_s")]
    if known:  # the same line by another scale, that of the last card
        per_token = 100 * known[-1]["mfu"] / known[-1]["tokens_per_s"]
        share = speed.twinx()
        share.set_ylim(0, per_token * speed.get_ylim()[1])
        share.set_ylabel("MFU, %")
    speed.set_xlabel("tokens")
    speed.xaxis.set_major_formatter(FuncFormatter(short))
    for one in axes:
        one.grid(alpha=0.3)
    figure.align_ylabels(axes)
    try:
        image.unlink(missing_ok=True)  # a link that stands there is not followed
        figure.savefig(image, dpi=120)
    except Exception as e:  # matplotlib's errors are many, and none may spoil a run's end
        return f"no {image.name}: {named_reason(e)}"
    return ""
