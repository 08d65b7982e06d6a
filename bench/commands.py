"""Run Python programs of this repository, and what they cost: time, disk, memory.

`python -m bench.commands ARGS` runs Python with ARGS and prints, last, the peak memory in bytes of
its largest process. This small process stands between because the system counts memory that a
process has had before exec, as a copy of its parent.
"""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parent.parent
LOOK_S = 0.05  # between two looks at the disk

Stream = int | IO[bytes] | None


@dataclass
class Cost:
    """What running a command took."""

    seconds: float
    disk: int  # largest sum of the files in its folder, bytes
    memory: int  # of its largest process, bytes; 0 = unknown (Windows)
    printed: str


@contextlib.contextmanager
def started(
    command: Sequence[str],
    environment: Mapping[str, str] | None = None,
    stdin: Stream = subprocess.DEVNULL,
    stdout: Stream = subprocess.PIPE,
    stderr: Stream = None,
) -> Iterator[subprocess.Popen[bytes]]:
    """A Python process in the repository's folder; its environment is ours when none is given.

    It has a session of its own: Ctrl-C reaches the caller alone, and at the end of `with` it is
    killed together with what it has started. Pipes have no buffers.
    """
    with subprocess.Popen(
        [sys.executable, *command],
        bufsize=0,
        cwd=ROOT,
        env=environment,
        stdin=stdin,
        stdout=stdout,
        stderr=stderr,
        start_new_session=True,
    ) as process:
        try:
            yield process
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and, but on Windows, what it has started."""
    with contextlib.suppress(OSError):  # it has ended
        if sys.platform == "win32":
            process.kill()
        else:
            os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def failed(command: Sequence[str], err: bytes) -> ValueError:
    """The error of a command that has failed: the last line that it wrote to stderr."""
    last = (err.decode(errors="replace").strip() or "no message").splitlines()[-1]
    return ValueError(f"{' '.join(command)} failed: {last}")


def run(
    command: Sequence[str],
    folder: Path | None = None,
    environment: Mapping[str, str] | None = None,
) -> Cost:
    """Run a command to its end; the disk is that of `folder`. Raises ValueError when it fails."""
    between = ["-m", "bench.commands", *command]
    peak, t0 = 0, time.perf_counter()
    with started(between, environment, stderr=subprocess.PIPE) as process:
        while True:
            try:
                out, err = process.communicate(timeout=LOOK_S)
                break
            except subprocess.TimeoutExpired:
                peak = max(peak, size_of(folder))
        seconds = time.perf_counter() - t0
    if process.returncode:
        raise failed(command, err)
    *lines, memory = out.decode(errors="replace").strip().splitlines()
    return Cost(seconds, max(peak, size_of(folder)), int(memory), "\n".join(lines).strip())


def size_of(folder: Path | None) -> int:
    """Bytes of the disk that the files below a folder take; they may vanish meanwhile."""
    total = 0
    for path, _, names in os.walk(folder) if folder else ():
        for name in names:
            try:
                stat = os.stat(os.path.join(path, name))
            except OSError:
                continue
            total += stat.st_blocks * 512 if hasattr(stat, "st_blocks") else stat.st_size
    return total


def main(command: Sequence[str]) -> int:
    """The process between: run a command, print its largest process's memory; its exit code."""
    code = subprocess.run([sys.executable, *command]).returncode
    memory = 0
    if sys.platform != "win32":
        import resource  # which Windows lacks

        unit = 1 if sys.platform == "darwin" else 1024
        memory = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * unit
    print(f"\n{memory}")
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
