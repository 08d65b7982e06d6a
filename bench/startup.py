"""How long a command takes to begin: python bench/startup.py

Seconds from starting train.py to its first step and sample.py to its first
token, the first time and with a compiler's cache. The model is the demo's, its
data the embedded corpus.
"""

import sys
from pathlib import Path

if __name__ == "__main__":  # the repository, not this folder, whose train.py is another
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import interrupt

    interrupt.take(interrupt.end)

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator

from bench.commands import run, started
from bench.picture import draw_bars
from bench.rounds import median
from bench.settings import check
from configurator import configure
from run import script

repeats = 3  # starts after the first
png = ""  # also draw the table into this file


def ways_of(data: Path, out: Path) -> Iterator[tuple[str, list[str], str]]:
    """Name, command, and what it prints when it has begun; the later ones need the first run."""
    train = ["train.py", "config/train_demo.py", f"--dataset={data}", f"--out_dir={out}"]
    train += ["--max_iters=1", "--warmup_iters=0", "--eval_windows=4", "--log_interval=1"]
    sample = ["sample.py", f"--out_dir={out}", "--num_samples=1"]
    sample += ["--max_new_tokens=1", "--device=cpu"]
    yield "python -c 'import torch'", ["-c", "import torch; print('ready')"], "ready"
    yield "train.py", [*train, "--compile=False"], "| loss"
    yield "train.py --compile=True", [*train, "--compile=True"], "| loss"
    yield "sample.py", sample, "tokens/s"
    yield "sample.py --quantize=int8", [*sample, "--quantize=int8"], "tokens/s"
    yield "sample.py --compile=True", [*sample, "--compile=True"], "tokens/s"


def seconds_until(command: list[str], sign: str, cache: Path) -> float:
    """From starting a command until `sign` stands in what it prints; it then runs to its end.

    cache: the compiler's. Raises ValueError when it fails before.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1", "TORCHINDUCTOR_CACHE_DIR": str(cache)}
    t0 = time.perf_counter()
    with started(command, environment, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        seen = b""
        while sign.encode() not in seen:
            more = process.stdout.read(2**16)
            if not more:
                raise ValueError(f"{' '.join(command)} failed: {seen.decode()[-300:]}")
            seen += more
        seconds = time.perf_counter() - t0
        process.stdout.read()
        process.wait()
    return seconds


def main() -> None:
    check(png=png, repeats=repeats)
    bars = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data, out = folder / "data", folder / "out"
        run(["data/prepare.py", "--source=stdlib", f"--dataset={data}"])
        print("| from typing it to its first step or token | first time, s | later, s |")
        print("|---|---|---|", flush=True)
        for way, command, sign in ways_of(data, out):
            cache = folder / way.replace(" ", "_")
            cold, *warm = (seconds_until(command, sign, cache) for _ in range(repeats + 1))
            print(f"| {way} | {cold:.1f} | {median(warm):.1f} |", flush=True)
            bars += [(f"{way}, first time", cold), (f"{way}, later", median(warm))]
    draw_bars(png, "seconds from typing to the first step or token", bars)


if __name__ == "__main__":
    globals().update(configure(globals()))
    script.run(main)
