"""How a script ends: a user's mistake is one line on stderr, with exit code 1.

It imports no torch before something fails: data/prepare.py ends like this, too.
"""

import io
import os
import sys
from collections.abc import Callable

from run import interrupt
from run.folder import unlock
from run.stop import watch
from text.files import line_of, reason


def run(main: Callable[[], None]) -> None:
    """Call a script's main part; a user's mistake ends in one line on stderr and exit code 1.

    Mistakes are ValueError and OSError; the configurator's own have another exit code, 2. Ctrl-C is
    a KeyboardInterrupt in main, where a run has not taken the signal for itself. `python -X dev`
    shows where mistakes came from.
    """
    script = os.path.basename(sys.argv[0])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console starts with cp1252
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        try:
            interrupt.take(interrupt.stop_main)
            main()
        finally:
            interrupt.take(interrupt.end)
    except (ValueError, OSError) as e:
        if sys.flags.dev_mode:
            raise
        print(f"{script}: {line_of(e)}", file=sys.stderr)
        sys.exit(getattr(e, "exit_code", 1))
    except Exception as e:
        from run.machine import is_oom

        if sys.flags.dev_mode or not is_oom(e):
            raise
        what = "a smaller batch, model or context, or --device=cpu"
        print(f"{script}: out of memory: {reason(e)}; try {what}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt as e:
        interrupt.tell(number := interrupt.number_of(e))
        sys.exit(128 + number)
    finally:
        watch(0)
        unlock()
        for name in ("stdout", "stderr"):  # Python would fail once more on a lost terminal
            try:
                getattr(sys, name).flush()
            except (OSError, ValueError):
                setattr(sys, name, None)
