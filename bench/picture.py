"""A table as a picture."""

from collections.abc import Sequence

from text.files import path_of


def draw_bars(path: str, title: str, bars: Sequence[tuple[str, float]]) -> None:
    """Draw labelled values as horizontal bars into a PNG; nothing without a path."""
    if not path:
        return
    from matplotlib.figure import Figure  # few draw

    figure = Figure(figsize=(7, 1 + 0.25 * len(bars)), layout="constrained")
    axes = figure.subplots()
    drawn = axes.barh([label for label, _ in bars], [value for _, value in bars])
    axes.bar_label(drawn, fmt="{:,.3g}", padding=2)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path_of(path), dpi=120)
