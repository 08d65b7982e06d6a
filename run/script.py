"""How a script ends: a user's mistake is one line on stderr, with exit code 1.

It imports no torch before something fails: data/prepare.py ends like this, too.
"""

import io
import os
import signal
import sys
from collections.abc import Callable

from configurator import ConfigError
from run.folder import unlock
from run.stop import watch
from text.files import reason


def run(main: Callable[[], None]) -> None:
    """Call a script's main part; a user's mistake ends in one line on stderr and exit code 1.

    Mistakes are ValueError and OSError; a flag that does not fit is a ConfigError, with exit code
    2. `python -X dev` shows where they came from.
    """
    script = os.path.basename(sys.argv[0])
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a Windows console starts with cp1252
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        main()
    except (ValueError, OSError) as e:
        if sys.flags.dev_mode:
            raise
        print(f"{script}: {' '.join(str(e).split())}", file=sys.stderr)
        sys.exit(2 if isinstance(e, ConfigError) else 1)
    except Exception as e:
        from run.machine import is_oom

        if sys.flags.dev_mode or not is_oom(e):
            raise
        what = "a smaller --batch_size, model or context, or --device=cpu"
        print(f"{script}: out of memory: {reason(e)}; try {what}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print(f"\n{script}: interrupted", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    finally:
        watch(0)
        unlock()
        for name in ("stdout", "stderr"):  # Python would fail once more on a lost terminal
            try:
                getattr(sys, name).flush()
            except (OSError, ValueError):
                setattr(sys, name, None)
