"""What ends a run before its time: signals, the end of torchrun, the clock, lost data, a hang."""

import faulthandler
import os
import signal
import sys
import threading
import time
from types import FrameType

from text.tokens import TokenData


class Stopped(Exception):
    """All ranks have agreed to end the run before its last update."""


class Stop:
    """Whether anybody has asked the run to end; `cause` says who, "" for nobody.

    The first SIGINT, SIGTERM, SIGHUP (the terminal was closed), SIGBREAK (Windows) or SIGUSR1 is
    noted, so that the run can save and end in order; a second one ends the process at once, unless
    it comes within REPEAT_S: torchrun and other supervisors pass a signal on that the process has
    got already. So is the end of a torchrun that started this process and left it behind, and the
    end of `time_limit` minutes from now (0: none). `failure` says what has become of the data.
    """

    REPEAT_S = 1.0

    NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK", "SIGUSR1")

    def __init__(self, time_limit: float = 0.0, watchdog_minutes: float = 0.0) -> None:
        self.time_limit, self.watchdog_minutes = time_limit, watchdog_minutes
        self.started = time.monotonic()
        self.data: TokenData | None = None  # looked at before it is read
        self.failure = ""
        self.signal: signal.Signals | None = None
        self.noted_at = 0.0
        self.under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        self.parent = os.getppid()
        for name in self.NAMES:
            number = getattr(signal, name, None)
            nohup = name == "SIGHUP" and number and signal.getsignal(number) == signal.SIG_IGN
            if number and not nohup:
                signal.signal(number, self.note)
        if hasattr(signal, "SIGTSTP"):
            signal.signal(signal.SIGTSTP, pause)

    def note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal, self.noted_at = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self.noted_at > self.REPEAT_S:
            os._exit(128 + number)

    @property
    def cause(self) -> str:
        if self.signal is not None:
            return self.signal.name
        if self.under_torchrun and os.getppid() != self.parent:
            return "the end of torchrun"
        late = self.time_limit and time.monotonic() - self.started > 60 * self.time_limit
        return f"time_limit={self.time_limit}" if late else ""

    def asked(self) -> bool:
        """Before each micro-step, which shows that the run is alive: is it to end?"""
        watch(60 * self.watchdog_minutes)
        try:  # to read beyond a file's new end would end the process
            if self.data is not None:
                self.data.check_size()
        except (ValueError, OSError) as e:
            self.failure = str(e)
        return bool(self.cause or self.failure)

    def exit_code(self) -> int:
        """0 under torchrun, which takes another code for a crash and starts anew; else 128 + n."""
        if self.signal is None or self.under_torchrun:
            return 0
        return 128 + self.signal


def watch(seconds: float) -> None:
    """End the process unless this is called again within `seconds`; 0 = watch no more.

    All threads' stacks then go to stderr, and the exit code is 1. It works while the main thread
    hangs in a read from a dead network drive, where no signal handler and no thread can run.
    """
    stderr = sys.__stderr__
    if 0 < seconds < threading.TIMEOUT_MAX and stderr is not None:
        faulthandler.dump_traceback_later(seconds, exit=True, file=stderr)
    else:
        faulthandler.cancel_dump_traceback_later()


def pause(number: int, frame: FrameType | None) -> None:
    """Ctrl-Z: the time until `fg` does not count as hanging."""
    watch(0)
    os.kill(os.getpid(), signal.SIGSTOP)
