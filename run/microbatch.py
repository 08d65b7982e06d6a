"""How many windows at once: what memory takes. An update does not depend on it."""

from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

import torch

from model import GPT
from run.agreement import Agreement, ShortElsewhere
from run.copies import Copies
from run.log import say
from run.machine import is_oom, release_memory, save_memory
from run.optim import moments
from run.start import TrainState
from text.files import reason

T = TypeVar("T")


def windows_of_rank(tokens_per_step: int, context: int, ranks: int) -> int:
    """Windows of an update that a rank takes. Raises ValueError naming what divides them."""
    windows, rest = divmod(tokens_per_step, context)
    if rest or not windows:
        low = max(1, windows) * context
        raise ValueError(
            f"tokens_per_step={tokens_per_step} is not a multiple of the context, {context}; "
            f"nearest: --tokens_per_step={low} or {low + context}"
        )
    if windows % ranks:
        fit = [n for n in range(1, min(windows, 2 * ranks) + 1) if windows % n == 0]
        raise ValueError(
            f"tokens_per_step={tokens_per_step} has {windows} windows of {context} tokens, which "
            f"{ranks} processes cannot share out evenly; take {', '.join(map(str, fit))} of them"
        )
    return windows // ranks


def largest_divisor(windows: int, most: int) -> int:
    """The largest number of at most `most` that divides `windows`."""
    return next(n for n in range(min(most, windows), 0, -1) if windows % n == 0)


class MicroBatch:
    """The windows that are computed together: `size` of them, `count` times an update.

    When memory is short less is kept for backward, then the size is halved, and the same piece of
    work is tried again.
    """

    def __init__(
        self,
        most: int,
        windows: int,
        state: TrainState,
        model: GPT,
        optimizer: torch.optim.Optimizer,
        agreement: Agreement,
        sharded: bool = False,
    ) -> None:
        self.windows, most = windows, state.micro_batch or most  # 0: somebody will `take` a size
        self.size = largest_divisor(windows, most) if most else 0
        self.note = ""  # for the user to read
        if self.size < most and not state.micro_batch:
            self.note = f"batch_size={self.size}, which divides the {windows} windows of a rank"
        self.state, self.model, self.optimizer = state, model, optimizer
        self.agreement = agreement
        self.sharded = sharded  # ranks exchange weights in each micro-step
        self.device = model.embed_tokens.weight.device
        self.compiled = False
        self.saving = self.most_saving = 1  # see save_memory
        self.copies: Copies | None = None  # of the weights, while gradients are summed up

    @property
    def count(self) -> int:
        """Micro-steps of an update."""
        return self.windows // self.size

    def take(self, size: int) -> None:
        """The size, where the settings leave it open; a resumed run has the same."""
        self.size = self.state.micro_batch = size
        self.note = f"batch_size=0: {size} windows at once are planned to be the fastest that fit"

    def line(self, context: int, ranks: int) -> str:
        """How an update falls into pieces, for the user to read."""
        by_ranks = f" x {ranks} ranks" if ranks > 1 else ""
        return f"{self.size} x {context} x {self.count} micro-steps{by_ranks}"

    def attempts(self) -> "Iterator[Attempt]":
        """Tries at a piece of work, `with` each, until one fits in memory."""
        while True:
            attempt = Attempt(self)
            yield attempt
            if not attempt.short:
                return
            self.shrink()

    def shrink(self) -> None:
        """Forget the try that failed, and keep less for backward, or take half as many windows."""
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()  # it may have happened in an evaluation
        if self.compiled:
            torch.compiler.reset()  # graphs of the old size are of no use, and have a limit
        if self.compiled and not self.sharded and self.saving < self.most_saving:
            self.saving = self.state.saving = self.most_saving
            self.copies = None
            save_memory(self.model, self.saving)
            say("going on with less kept for backward; same tokens")
        elif self.size > 1:
            self.size = self.state.micro_batch = largest_divisor(self.windows, self.size // 2)
            say(f"going on with {self.size} x {self.count} micro-steps; same tokens")
        else:
            raise ValueError(
                "out of memory with batch_size=1; use a smaller model or max_position_embeddings"
            )
        release_memory(self.device)


class Attempt:
    """One try at an update, an evaluation or a rehearsal with the micro-batch as it is.

    Leaves with Stopped when ranks have agreed to end. Running out of memory is caught, and noted as
    `short`, unless ranks were already exchanging numbers: they would wait for this one.
    """

    def __init__(self, micro: MicroBatch) -> None:
        self.micro = micro
        self.short = self.met = False  # met: ranks have agreed to exchange numbers
        self.room: torch.Tensor | None = None

    def __enter__(self) -> "Attempt":
        return self

    def take_room(self) -> None:
        """What an update needs: `lend`, and room for the moments, which its end first allocates.

        Then it would be too late to try again.
        """
        micro = self.micro
        self.lend()
        if not micro.optimizer.state and not micro.sharded:
            self.room = torch.empty(moments(micro.optimizer.param_groups), device=micro.device)

    def lend(self) -> None:
        """Have the model compute with copies of its weights, where it has them, until the end."""
        if self.micro.copies:
            self.micro.copies.lend()

    def agree(self) -> None:
        """Before ranks exchange numbers. Raises Stopped, or ShortElsewhere for `with` to catch."""
        self.micro.agreement.reach()
        self.met = not self.micro.agreement.alone

    def steps(self) -> Iterator[tuple[int, bool]]:
        """Numbers of an update's micro-steps, and whether each is the last.

        Gradients are exchanged in the last one; sharded, weights in each. A rank that is asked to
        end skips what is before: an update can take longer than the grace after a signal.
        """
        self.take_room()
        sharded, count = self.micro.sharded, self.micro.count
        for i in range(count):
            last = i == count - 1
            ends = self.micro.agreement.asked()
            if i == (0 if sharded else count - 1):
                self.agree()
            if last or sharded or not ends:
                yield i, last

    def checked(self, batches: Iterable[T]) -> Iterator[T]:
        """An evaluation's batches, until somebody asks the run to end: `agree` comes after them.

        It begins with `lend`.
        """
        self.lend()
        for batch in batches:
            if self.micro.sharded:
                self.agree()
            elif self.micro.agreement.asked():
                return
            yield batch

    def __exit__(
        self, kind: type[BaseException] | None, e: BaseException | None, at: TracebackType | None
    ) -> bool:
        self.room = None
        if self.micro.copies:
            self.micro.copies.take_back()
        elsewhere = isinstance(e, ShortElsewhere)
        if not elsewhere and not is_oom(e):
            return False
        size = self.micro.size
        if self.met or self.micro.sharded:
            raise ValueError(
                f"out of memory with batch_size={size} while ranks exchange numbers; go on with "
                "--init_from=auto and a smaller --batch_size"
            ) from e
        why = "another rank is out of memory" if elsewhere or e is None else reason(e)[:120]
        say(f"out of memory with batch_size={size}: {why}")
        if not elsewhere:
            self.micro.agreement.reach(short=True)
        self.short = True
        return True
