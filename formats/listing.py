"""Which checkpoints a folder holds. Imports no torch."""

import os
import re
import shutil
from pathlib import Path

PARTS = ".shards"  # of a folder that holds a checkpoint in parts
KINDS = (".pt", PARTS)


def checkpoints(out_dir: Path) -> list[Path]:
    """Every checkpoint of a run in a folder."""
    best = (out_dir / f"best{suffix}" for suffix in KINDS)
    return [path for _, path in steps_saved(out_dir)] + [path for path in best if path.exists()]


def remove(path: Path) -> None:
    """Delete a checkpoint, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def tidy(out_dir: Path) -> None:
    """Finish or remove what a process that was killed while it wrote has left in a folder."""
    for suffix in KINDS:
        for temp in out_dir.glob(f"*{suffix}.tmp"):
            remove(temp)
    for old in out_dir.glob(f"*{PARTS}.old"):  # its successor was to take its place
        if old.with_suffix("").exists():
            remove(old)
        else:
            os.replace(old, old.with_suffix(""))


def steps_saved(out_dir: Path) -> list[tuple[int, Path]]:
    """(step, path) of the checkpoints ckpt_<step> in a folder, newest first."""
    found = []
    for path in out_dir.glob("ckpt_*"):
        if match := re.fullmatch(r"ckpt_(\d+)\.(pt|shards)", path.name):
            found.append((int(match[1]), path))
    return sorted(found, reverse=True)
