"""What a run reports beside its checkpoints: metrics.jsonl, wandb and loss.png.

None of the three can stop a run: what goes wrong is returned as a line for the user.
"""

import contextlib
import json
import os
from pathlib import Path
from typing import Any

Record = dict[str, Any]


def write_text(path: Path, text: str) -> None:
    """Write a small file whole or not at all; a link that stands there is not followed."""
    temp = path.with_name(path.name + ".tmp")
    temp.unlink(missing_ok=True)
    with open(temp, "x", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temp, path)


def read_records(metrics: Path) -> list[Record]:
    """The records of metrics.jsonl; a line that a crash or a full disk cut short is left out."""
    records = []
    for line in metrics.read_text(encoding="utf-8").splitlines() if metrics.exists() else []:
        with contextlib.suppress(ValueError):
            records.append(json.loads(line))
    return records


def keep_records(metrics: Path, step: int) -> None:
    """Drop from metrics.jsonl what a resumed run will log again: records of `step` and later."""
    kept = [r for r in read_records(metrics) if r["iter"] < step]
    write_text(metrics, "".join(json.dumps(r) + "\n" for r in kept))


def add_record(metrics: Path, record: Record) -> str:
    """Append a record to metrics.jsonl; why it failed, or ""."""
    try:
        with metrics.open("ab", buffering=0) as f:
            end, line = f.tell(), (json.dumps(record) + "\n").encode()
            if f.write(line) < len(line):
                f.truncate(end)  # half a line would take the next one with it
                raise OSError("the disk is full")
    except OSError as e:
        return f"WARNING  {metrics} not written: {e}"
    return ""


def draw_losses(metrics: Path, image: Path) -> str:
    """Plot training and validation loss against tokens from metrics.jsonl; why not, or ""."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return "no loss.png: matplotlib is not installed"
    records = read_records(metrics)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label, style in (("loss", "training", "-"), ("val_loss", "validation", "o-")):
        points = [(r["tokens"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, lw=1, ms=3)
            axes.legend()
    axes.set(xlabel="tokens", ylabel="loss, nats per token")
    axes.grid(alpha=0.3)
    try:
        image.unlink(missing_ok=True)  # a link that stands there is not followed
        figure.savefig(image, dpi=150)
    except OSError as e:
        return f"no loss.png: {e}"
    return ""


class Wandb:
    """A run at wandb, or nothing at all when wandb is off or unwell.

    `run_id` is the run's name there, to go on with it later; `problem` says why it is off.
    """

    def __init__(
        self, on: bool, project: str, name: str, config: Record, run_id: str | None
    ) -> None:
        self.run: Any = None
        self.run_id, self.problem = run_id, ""
        if not on:
            return
        try:
            import wandb

            settings: Record = {"project": project, "name": name, "config": config}
            self.run = wandb.init(**settings, id=run_id, resume="allow")
            self.run_id = self.run.id
        except Exception as e:  # wandb's errors are many, and none may stop a run
            self.problem = f"wandb is off: {type(e).__name__}: {e}".splitlines()[0]

    def log(self, record: Record) -> str:
        """Send a record; why it failed, or ""."""
        if self.run is not None:
            try:
                self.run.log(record, step=record["iter"])
            except Exception as e:
                return f"wandb: {type(e).__name__}: {e}".splitlines()[0]
        return ""
