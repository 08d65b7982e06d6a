"""Writes the checkpoints of a run while it goes on."""

import contextlib
import math
import os
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from formats import checkpoint
from formats.listing import KINDS, PARTS, remove, steps_saved
from formats.pack import Packed, take_part
from run.log import say
from run.start import TrainState
from run.team import Team


def step_aside() -> None:
    """Let this thread run when the others leave a core idle; where threads have priorities."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), 19)


class Saver:
    """Writes the checkpoints of a run in a thread, one at a time, and deletes the old ones.

    The newest `keep_last` stay, those at multiples of `milestone_interval` (0: none), and best.pt.
    A write that fails leaves what was there. `problem` says why the last ckpt_<step>.pt failed, ""
    when it did not; `best_failed` is the same for best.pt; `unsaid` holds all failures until the
    caller takes them out to tell the user. With writes=False nothing is written: a process that is
    not the first of its run only takes part in collecting the state. With in_parts every process
    writes its part: ckpt_<step>.shards and best.shards.
    """

    def __init__(
        self,
        out_dir: Path,
        keep_last: int,
        milestone_interval: int = 0,
        writes: bool = True,
        in_parts: bool = False,
    ) -> None:
        self.out_dir, self.keep_last, self.milestone = out_dir, keep_last, milestone_interval
        self.writes, self.parts = writes, None  # or what writes the parts
        if in_parts:
            from formats.sharded import Writer  # few need it, and it takes a second

            self.parts = Writer()
        self.suffix = PARTS if in_parts else ".pt"
        self.begin(-1, 0, math.inf)
        self.best_before: float | None = None  # the loss of the best one before the last
        self.thread = ThreadPoolExecutor(1, "checkpoint", initializer=step_aside)
        self.job: Future[None] | None = None
        self.packed: dict[str, Packed] = {}  # copies of the last state's parts
        self.problem = self.best_failed = ""
        self.unsaid: list[str] = []

    def begin(self, saved_step: int, interval: int, minutes: float) -> None:
        """The run begins; saved_step is what it was resumed from, -1 for nothing.

        A checkpoint is due at multiples of `interval` (0: none), and late after `minutes`.
        """
        self.interval, self.minutes = interval, minutes
        self.saved_step, self.saved_at = saved_step, time.monotonic()

    def is_late(self) -> bool:
        """Whether the last checkpoint is older than the user wants; ranks' clocks differ."""
        return time.monotonic() - self.saved_at > 60 * self.minutes

    def is_due(self, step: int) -> bool:
        """Whether the settings want a checkpoint of this step."""
        return any(n and step % n == 0 for n in (self.interval, self.milestone))

    def lacks(self, step: int, team: Team) -> bool:
        """Whether on any rank this step has not been saved, or the last write has failed."""
        (lacking,) = team.any(self.saved_step != step or bool(self.problem))
        return lacking

    def tell(self) -> None:
        """Say which writes have failed since the last time."""
        while self.unsaid:
            say(f"WARNING  {self.unsaid.pop(0)}; training goes on without a new checkpoint")

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state to the CPU now and write ckpt_<step>.pt soon."""
        self.submit(state, self.write, step)
        self.saved_step, self.saved_at = step, time.monotonic()

    def is_best(self, state: TrainState, val_loss: float, team: Team) -> bool:
        """Whether rank 0 has the lowest loss so far, which is then the state's.

        A best one that could not be written does not count.
        """
        if self.best_failed:
            state.best_val_loss = self.best_before
        if not team.share(val_loss < (state.best_val_loss or math.inf)):
            return False
        self.best_before, state.best_val_loss = state.best_val_loss, val_loss
        return True

    def save_best(self, state: dict[str, Any]) -> None:
        """The same for best.pt, a file of its own: one bad disk block cannot spoil two."""
        self.submit(state, self.write_best)

    def submit(self, state: dict[str, Any], write: Callable[..., None], *args: int) -> None:
        self.wait()
        if self.parts:
            self.job = self.thread.submit(write, *args, self.parts.copy(state))
        elif self.writes:
            self.job = self.thread.submit(write, *args, self.copy(state))
        else:
            for part in state.values():
                take_part(part)

    def copy(self, state: dict[str, Any]) -> dict[str, Any]:
        """Each part in memory of its own: who loads the file and drops one part gets its room."""
        return {k: self.packed.setdefault(k, Packed()).copy(v) for k, v in state.items()}

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self.job is not None:
            self.job.result()
            self.job = None

    def write_best(self, state: Any) -> None:
        self.best_failed = self.try_to_write(f"best{self.suffix}", state)
        if self.writes and not self.best_failed:  # one of the other kind is an older one
            for other in {*KINDS} - {self.suffix}:
                with contextlib.suppress(OSError):
                    remove(self.out_dir / f"best{other}")

    def write(self, step: int, state: Any) -> None:
        self.problem = self.try_to_write(f"ckpt_{step}{self.suffix}", state)
        if self.writes and not self.problem:
            for old, path in steps_saved(self.out_dir)[self.keep_last :]:
                if not self.milestone or old % self.milestone or old == 0:
                    with contextlib.suppress(OSError):  # open in another program; next time then
                        remove(path)

    def try_to_write(self, name: str, state: Any) -> str:
        try:
            (self.parts.save if self.parts else checkpoint.save)(self.out_dir / name, state)
        except (OSError, ValueError) as e:
            self.unsaid.append(str(e))
            return str(e)
        return ""
