"""Ctrl-C and a closed terminal: one line and an exit code, from a script's first import on.

It imports next to nothing, so that a script begins with it: the libraries take seconds to load.
"""

import atexit
import contextlib
import functools
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

NAMES = ("SIGINT", "SIGHUP")  # Windows has no SIGHUP

Handler = Callable[[int, FrameType | None], None] | signal.Handlers


def take(handler: Handler) -> None:
    """Let a handler have the signals that neither nohup nor a run (stop.py) has for itself."""
    free = (signal.SIG_DFL, signal.default_int_handler, end, stop_main)
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) in free:
            signal.signal(number, handler)
    ignore_at_exit()


@functools.cache
def ignore_at_exit() -> None:
    """As Python's last act, when all is done and it calls no handler any more, ignore them.

    What is registered first is called last.
    """
    atexit.register(take, signal.SIG_IGN)


def end(number: int, frame: FrameType | None) -> None:
    """Before a script's main part and after it: nothing is to be tidied up."""
    tell(number)
    os._exit(128 + number)


def stop_main(number: int, frame: FrameType | None) -> None:
    """In it: all that is open is closed on the way out."""
    raise KeyboardInterrupt(number)


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Inside it the system ends the process: while C++ waits for others no handler of ours runs."""
    before = {}
    for name in NAMES:
        number = getattr(signal, name, None)
        if number is not None and signal.getsignal(number) != signal.SIG_IGN:
            before[number] = signal.signal(number, signal.SIG_DFL)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def number_of(e: KeyboardInterrupt) -> int:
    """The signal's number."""
    return int(e.args[0]) if e.args else signal.SIGINT


def tell(number: int) -> None:
    """Say what ended the script: one process of several does, and none that it has started.

    Past Python's buffers: the signal may have come while something was printed.
    """
    processes = sys.modules.get("multiprocessing")
    started = processes is not None and processes.parent_process() is not None
    if started or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    by = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
    line = f"{os.path.basename(sys.argv[0])}: interrupted{by}\n"
    line = f"\n{line}" if os.isatty(2) else line  # there the cursor may stand behind a text
    with contextlib.suppress(OSError):  # the terminal has gone
        os.write(2, line.encode(errors="replace"))
