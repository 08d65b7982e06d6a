"""The processes of a run: who they are, what they agree on, who speaks.

Under torchrun (or anything that sets RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT) `join` makes
the processes a team. A process alone is a team of one, for which everything here does nothing.
Data travels by NCCL between GPUs; all that concerns only the hosts (flags, settings, texts) by
gloo, so that no agreement waits for a GPU.
"""

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from run import interrupt

VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What a peer that died looks like, beside torch's own DistError: gloo's bare RuntimeErrors.
LOST = ("gloo/transport", "Connection closed by peer", "Connection reset by peer")


@dataclass(frozen=True)
class Team:
    """The processes of a run, as one of them sees them.

    All methods but `device` and `launcher` are collective: every rank calls them in the same order.
    """

    rank: int = 0
    ranks: int = 1
    local_rank: int = 0  # on this machine
    local_ranks: int = 1
    alone: bool = True  # no process group at all

    def device(self, name: str) -> str:
        """This process's own of a device setting: auto and cuda are the GPU of its local rank.

        Raises ValueError for a setting that would give all processes one device.
        """
        if self.alone or name == "cpu":
            return name
        if name not in ("auto", "cuda"):
            raise ValueError(
                f"device={name!r} with {self.ranks} processes, where each takes its own; write "
                "--device=auto, cuda or cpu, and choose GPUs by CUDA_VISIBLE_DEVICES"
            )
        return f"cuda:{self.local_rank}" if name == "cuda" or torch.cuda.is_available() else "cpu"

    def launcher(self) -> list[str]:
        """The command that the script's name and flags follow."""
        if self.alone:
            return ["python"]
        where = "--standalone" if self.ranks == self.local_ranks else "..."
        return ["torchrun", where, f"--nproc_per_node={self.local_ranks}"]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag, whether a rank raised it."""
        return tuple(map(bool, self.most(*flags)))

    def most(self, *numbers: int) -> list[int]:
        """For each number, the largest of any rank."""
        if self.alone:
            return list(numbers)
        most = torch.tensor(numbers, dtype=torch.int32)
        dist.all_reduce(most, dist.ReduceOp.MAX)
        return [int(n) for n in most.tolist()]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over ranks, in place, on any device."""
        if not self.alone:
            dist.all_reduce(tensor)
        return tensor

    def share(self, value: Any, source: int = 0) -> Any:
        """A rank's value, of plain types that JSON knows, on all ranks; all wait for that rank."""
        if self.alone:
            return value
        data = json.dumps(value).encode() if self.rank == source else b""
        size = torch.tensor(len(data))
        dist.broadcast(size, source)
        text = torch.frombuffer(bytearray(data or int(size)), dtype=torch.uint8)
        dist.broadcast(text, source)
        return json.loads(bytes(text.tolist()))

    def first(self, text: str) -> str:
        """The text of the lowest rank that has one, "" when none has."""
        if self.alone:
            return text
        lowest = torch.tensor(self.rank if text else self.ranks)
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return str(self.share(text, int(lowest))) if lowest < self.ranks else ""


def in_team() -> bool:
    """Whether this process was started as one of several."""
    return all(name in os.environ for name in VARIABLES)


def is_first() -> bool:
    """Whether this process writes and speaks for the run: rank 0, or a process alone."""
    return not in_team() or os.environ["RANK"] == "0"


def join(minutes: float) -> Team:
    """The team of this process, once all its processes are there.

    minutes: how long a process waits for another before it gives up.
    """
    if not in_team():
        return Team()
    wait = timedelta(minutes=minutes)
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    with interrupt.at_once():
        store, _, _ = next(rendezvous("env://", rank, ranks, timeout=wait))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun restarts workers with the store of the dead ones (pytorch 167288): without a
        # prefix of their own the new ones find and dial the old addresses. Nodes count restarts
        # each for itself, so several need TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/cluster.md).
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.distributed_c10d.PrefixStore(f"attempt {attempt}", store)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with interrupt.at_once():
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks, timeout=wait)
    local = int(os.environ.get("LOCAL_RANK", "0")), int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Team(rank, ranks, *local, alone=False)


def speaks() -> bool:
    """Whether this process is the one to tell the user of an error that others may have, too."""
    if not in_team():
        return True
    if not dist.is_initialized():  # all have read the same settings
        return os.environ.get("LOCAL_RANK", "0") == "0"
    with contextlib.suppress(Exception):  # the store may have ended with the process that held it
        me = os.environ["RANK"]
        winner: bytes = dist.distributed_c10d._get_default_store().compare_set("speaker", "", me)
        return winner.decode() == me
    return False


@contextlib.contextmanager
def one_voice() -> Iterator[None]:
    """What is printed inside is printed by the first process of each machine only."""
    with contextlib.ExitStack() as stack:
        if in_team() and os.environ.get("LOCAL_RANK", "0") != "0":
            null = stack.enter_context(open(os.devnull, "w", encoding="utf-8"))
            stack.enter_context(contextlib.redirect_stdout(null))
            stack.enter_context(contextlib.redirect_stderr(null))
        yield


def run_team(main: Callable[[], None]) -> None:
    """Call main; of the errors that all ranks see at once, one rank's is raised.

    The others exit with code 1 without a word. A process alone is left as it is.
    """
    if not in_team():
        return main()
    try:
        main()
    except Exception as e:
        if not speaks():
            sys.exit(1)
        if isinstance(e, dist.DistError) or any(words in str(e) for words in LOST):
            raise OSError(
                "another process of the run ended or cannot be reached; start again with "
                f"--init_from=auto ({str(e).splitlines()[0][:100]})"
            ) from e
        raise
    except SystemExit:
        leave()
        raise
    leave()


def leave() -> None:
    """End the team in order; after an error it is left as it is: others may hang in it."""
    if dist.is_initialized():
        # Gloo's thread takes Python's lock to drop the tensors of its last exchange. A group that
        # is destroyed before that holds the lock and waits for the thread, for ever (seen once).
        time.sleep(0.3)
        dist.destroy_process_group()
