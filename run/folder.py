"""The folder of a run: one process at a time, nothing replaced unasked, room on the disk.

It imports no torch: data/prepare.py takes the same lock.
"""

import contextlib
import errno
import os
import platform
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from formats import listing
from run import records
from text.files import path_of

HELD = (errno.EAGAIN, errno.EACCES, errno.EDEADLK)  # what a lock of somebody else looks like


class Held(ValueError):
    """The lock is another process's; the text says whose."""


def is_file_of(path: Path, handle: int) -> bool:
    """Whether a path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False


class Lock:
    """A file that one process at a time holds; the system frees it however that process ends.

    `holder` is who has held it and died without a word, "" for nobody; `problem` is why there is
    no lock at all, on a file system that has none. Raises Held.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.problem = path, ""
        no_follow = getattr(os, "O_NOFOLLOW", 0)  # a link here could name any file of the user's
        handle = os.open(path, os.O_RDWR | os.O_CREAT | no_follow, 0o666)
        self.file = os.fdopen(handle, "r+", encoding="utf-8", errors="replace")
        self.holder = self.file.read(1000).strip()
        try:
            if sys.platform == "win32":
                import msvcrt

                self.file.seek(1 << 20)  # a locked byte cannot be read, so not one of the text
                msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if not is_file_of(path, handle):
                    raise OSError(errno.EAGAIN, "its holder has just deleted it")
        except OSError as e:
            if e.errno in HELD:
                self.file.close()
                raise Held(self.holder or "another process") from e
            self.problem = e.strerror or str(e)
        self.write(f"pid {os.getpid()} on {platform.node()}")

    def write(self, text: str) -> None:
        """What the file tells people."""
        self.file.seek(0)
        self.file.truncate()
        self.file.write(text)
        self.file.flush()

    def free(self, delete: bool = False) -> None:
        """Give it back, in order."""
        self.write("")
        if sys.platform == "win32":  # which deletes no open file, nor one that others wait for
            self.file.close()
        try:
            if delete:  # before it is free: no second holder
                with contextlib.suppress(OSError):
                    self.path.unlink(missing_ok=True)
        finally:
            self.file.close()


_locks: list[Lock] = []


def lock(folder: Path) -> str:
    """Make this process the only one that writes to `folder`, until `unlock` or its end.

    Returns a line about a holder that died without a word, or about a file system that has no
    locks; else "". Raises ValueError naming the process that holds the folder.
    """
    try:
        mine = Lock(folder / ".lock")
    except Held as e:
        raise ValueError(
            f"{folder} is in use by another run ({e}); end that one, or choose another --out_dir"
        ) from e
    _locks.append(mine)
    if mine.problem:
        last = f" (last: {mine.holder})" if mine.holder else ""
        return f"{folder} cannot be locked ({mine.problem}): let no other run write there{last}"
    return f"took over {folder} from {mine.holder}, which is gone" if mine.holder else ""


def unlock() -> None:
    """Give back what `lock` took, at the orderly end of a run."""
    while _locks:
        _locks.pop().free()


def claim(out: Path, source: str, overwrite: bool) -> str:
    """Make and lock a run's folder; returns lock's line.

    source: where the run starts from. Raises ValueError when a run that the folder holds would be
    replaced.
    """
    out.mkdir(parents=True, exist_ok=True)
    line = lock(out)
    where = path_of(source).resolve()
    if source not in ("scratch", "resume") and out.resolve() in (where, where.parent):
        raise ValueError(
            f"a new run from {source} would replace it: choose another --out_dir, or "
            "--init_from=resume to go on with that run"
        )
    if source != "resume" and not overwrite and listing.checkpoints(out):
        raise ValueError(
            f"{out} holds a run already; go on with it (--init_from=resume), choose another "
            "--out_dir, or replace it (--overwrite=True)"
        )
    return line


def tidy(out: Path, resumed_at: int | None) -> None:
    """Remove what a run of before has left: another one's files, or what came after resumed_at."""
    listing.tidy(out)
    metrics = out / "metrics.jsonl"
    if resumed_at is None:
        for old in [*listing.checkpoints(out), metrics]:
            listing.remove(old)
        return
    records.keep_records(metrics, resumed_at)
    for found, newer in listing.steps_saved(out):
        if found > resumed_at:  # passed over for damage
            damaged = newer.with_name(newer.name + ".damaged")
            listing.remove(damaged)
            os.replace(newer, damaged)


def disk_needed(settings: Mapping[str, Any], numbers: int) -> dict[str, int]:
    """Of a run: bytes of a checkpoint, number of them, bytes of the log.

    numbers: of the weights and the optimizer's moments.
    """
    s = settings
    milestones = s["max_iters"] // s["milestone_interval"] if s["milestone_interval"] else 0
    return {  # in float32; a record of the log has 300 bytes
        "size": 4 * numbers,
        "count": s["keep_last"] + milestones + 2,
        "log": 300 * (s["max_iters"] // s["log_interval"] + s["max_iters"] // s["eval_interval"]),
    }


def check_disk(out_dir: Path, size: int, count: int, log: int) -> None:
    """Raises ValueError when the disk has no room for `count` files of `size` and `log` more bytes.

    The checkpoints that are there count as free: the run will replace them, or has counted them.
    """
    needed = size * count + log
    paths = listing.checkpoints(out_dir)
    files = [f for p in paths for f in (p.iterdir() if p.is_dir() else [p])]
    there = {(s.st_dev, s.st_ino): s.st_size for s in (f.stat() for f in files)}
    free = shutil.disk_usage(out_dir).free + sum(there.values())
    if free < needed:
        logs = log > needed / 2
        less = "a larger --log_interval" if logs else "--keep_last=1 or fewer milestones"
        raise ValueError(
            f"{out_dir} has {free / 1e9:.3f} GB free, but the run needs {needed / 1e9:.3f} GB for "
            f"{count} checkpoints (the last, the milestones, the best, one being written) and "
            f"{log / 1e9:.3f} GB of log; make room, choose another --out_dir, {less}"
        )
