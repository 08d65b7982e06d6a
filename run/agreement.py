"""What ranks agree on before they exchange numbers: whether all go on."""

from run.saver import Saver
from run.stop import Stop, Stopped
from run.team import Team


class ShortElsewhere(Exception):
    """Another rank is out of memory, so all try again with a smaller micro-batch."""


class Agreement:
    """An exchange of flags between ranks, one an update: whether all go on.

    Nobody leaves alone: a rank that is asked to end, whose clock says that a checkpoint is late, or
    that is out of memory tells the others, and all do the same. `save_due`: a checkpoint is late.
    """

    def __init__(self, team: Team, stop: Stop, saver: Saver) -> None:
        self.team, self.stop, self.saver = team, stop, saver
        self.save_due = False

    @property
    def alone(self) -> bool:
        """Whether there is nobody to agree with."""
        return self.team.alone

    def asked(self) -> bool:
        """Whether this rank is asked to end; the others do not know yet."""
        return self.stop.asked()

    def reach(self, short: bool = False) -> None:
        """Before ranks exchange numbers; short: this one is out of memory.

        Raises ShortElsewhere when another one is, else Stopped when anybody is asked to end; to a
        rank that is short itself, nothing: it tries again with the others.
        """
        flags = self.asked(), self.saver.is_late(), short
        ended, self.save_due, elsewhere = self.team.any(*flags)
        if short:
            return
        if elsewhere:
            raise ShortElsewhere
        if ended:
            raise Stopped
