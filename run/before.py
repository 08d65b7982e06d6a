"""What a config file asks to be there before its run: a trained model to start from."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

from formats.listing import steps_saved

ROOT = Path(__file__).resolve().parent.parent


def trained(out_dir: str, *commands: str) -> str:
    """The best checkpoint of the run in a folder, which the commands make where it is not finished.

    Each command is a script of this repository with its flags, blanks between them. For `train.py`
    alone: a plan, a run from elsewhere, or a config file that is only read starts nothing. Raises
    ValueError when one fails, or in one of several processes.
    """
    out = Path(out_dir)
    best = out / "best.pt"
    flags = {arg[2:].partition("=")[0].replace("-", "_") for arg in sys.argv if arg[:2] == "--"}
    script = Path(getattr(sys.modules["__main__"], "__file__", None) or "").name
    if script != "train.py" or flags & {"dry_run", "init_from"} or is_finished(out):
        return str(best)
    if "RANK" in os.environ:
        raise ValueError(f"there is no finished run in {out_dir}: start once without torchrun")
    for command in commands:
        script, *given = command.split()
        print(f"first    python {command}", flush=True)
        before = signal.signal(signal.SIGINT, lambda *_: None)  # which ends the script, in its way
        try:
            ended = subprocess.run([sys.executable, str(ROOT / script), *given]).returncode
        finally:
            signal.signal(signal.SIGINT, before)
        if ended:
            raise ValueError(f"{script} ended with {ended}; the same command goes on from there")
    return str(best)


def is_finished(out: Path) -> bool:
    """Whether a folder holds a run with all its updates and a best checkpoint."""
    try:
        updates = json.loads((out / "config.json").read_text(encoding="utf-8"))["max_iters"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    saved = steps_saved(out)
    return bool(saved) and saved[0][0] >= updates and (out / "best.pt").exists()
