"""Whether an update may be made: losses and gradients that are not finite, spikes, giving up."""

import json
import math
import statistics
from pathlib import Path
from typing import NoReturn

from run.log import say
from run.saver import Saver
from run.start import TrainState
from run.team import Team
from text import files

SPIKE_WINDOW = 100  # losses that skip_spike looks back on


def is_spike(loss: float, recent: list[float], deviations: float) -> bool:
    """Whether a loss stands out of the last SPIKE_WINDOW ones by so many standard deviations."""
    if not deviations or len(recent) < SPIKE_WINDOW:
        return False
    return loss > statistics.fmean(recent) + deviations * statistics.stdev(recent)


class Health:
    """Counts the updates that are left out; too many in a row end the run."""

    def __init__(self, state: TrainState, skip_spike: float, max_skipped: int) -> None:
        self.state, self.skip_spike, self.max_skipped = state, skip_spike, max_skipped
        self.left_out, self.why = 0, ""  # in a row

    def is_good(self, step: int, loss: float, grad_norm: float) -> bool:
        """Whether to make the update; if not, says why."""
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        spike = finite and is_spike(loss, self.state.recent_losses, self.skip_spike)
        if self.skip_spike and finite:
            self.state.recent_losses = [*self.state.recent_losses, loss][-SPIKE_WINDOW:]
        if finite and not spike:
            self.left_out = 0
            return True
        self.state.skipped += 1
        self.left_out += 1
        self.why = "a spike" if spike else "not finite"
        say(f"step {step:>6} | left out, {self.why}: loss {loss}, gradient norm {grad_norm}")
        return False

    def is_hopeless(self) -> bool:
        """Whether too many updates in a row were left out."""
        return self.left_out >= self.max_skipped

    def give_up(
        self,
        out: Path,
        step: int,
        loss: float,
        grad_norm: float,
        windows: list[int],
        saver: Saver,
        team: Team,
    ) -> NoReturn:
        """Write bad_step.json, with the first tokens of the step's windows; raises ValueError."""
        report = {"iter": step, "loss": loss, "grad_norm": grad_norm, "windows": windows}
        if team.rank == 0:
            files.write(out / "bad_step.json", json.dumps(report))
        saver.wait()
        team.share(None)  # not before rank 0 has written: who ends in an error ends all
        raise ValueError(
            f"{self.left_out} updates in a row were left out, the last at step {step} "
            f"({self.why}); the last good checkpoint is in {out}, the step's windows in "
            "bad_step.json. Try a lower learning_rate"
        )
