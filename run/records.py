"""Where a run's figures go: metrics.jsonl, and wandb.

Neither can stop a run that goes on: what goes wrong is returned as a line for the user.
"""

import contextlib
import json
from pathlib import Path
from typing import Any

from text import files

Record = dict[str, Any]
FIGURES = ("iter", "tokens", "loss", "val_loss", "lr", "grad_norm", "tokens_per_s", "mfu")


def read_records(metrics: Path) -> list[Record]:
    """The records of metrics.jsonl; what is none, as a line that a crash cut short, is left out."""
    data = metrics.read_bytes() if metrics.exists() else b""
    records = []
    for line in data.split(b"\n"):
        with contextlib.suppress(ValueError, RecursionError):
            if is_record(record := json.loads(line)):
                records.append(record)
    return records


def is_record(value: Any) -> bool:
    """Whether a value out of a file is a record: its figures are numbers, or None."""
    return isinstance(value, dict) and all(
        isinstance(value[k], float) or files.whole(value[k], -(2**63), 2**63)
        for k in FIGURES
        if value.get(k) is not None
    )


def keep_records(metrics: Path, step: int) -> None:
    """Drop from metrics.jsonl what a resumed run will log again: records of `step` and later."""
    kept = [r for r in read_records(metrics) if (r.get("iter") or 0) < step]
    files.write(metrics, "".join(json.dumps(r) + "\n" for r in kept))


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


class Wandb:
    """A run at wandb, or nothing at all when wandb is off or unwell.

    `run_id` is the run's name there, to go on with it later; `problem` says why it is off.
    """

    def __init__(
        self, on: bool, project: str, name: str, settings: Record, run_id: str | None
    ) -> None:
        self.run: Any = None
        self.run_id, self.problem = run_id, ""
        if not on:
            return
        try:
            import wandb

            known: Record = {"project": project, "name": name, "config": settings}
            self.run = wandb.init(**known, id=run_id, resume="allow")
            self.run_id = self.run.id
        except Exception as e:  # wandb's errors are many, and none may stop a run
            self.problem = f"wandb is off: {files.named_reason(e)}"

    def log(self, record: Record) -> str:
        """Send a record; why it failed, or ""."""
        if self.run is not None:
            try:
                self.run.log(record, step=record["iter"])
            except Exception as e:
                return f"wandb: {files.named_reason(e)}"
        return ""
