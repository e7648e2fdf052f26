"""Runs that share their first steps.

Under a warmup-stable-decay schedule the rate does not depend on the length of the run until the
decay begins.  As the data order is a function of seed and step, two such runs that differ in
their length alone pass through the same states up to there: the shorter one may begin at a
checkpoint of the longer one, its trunk, and ends with the same weights as if it had been trained
from the start (Hägele et al. 2024, "Scaling laws and compute-optimal training beyond fixed
training durations").
"""

from __future__ import annotations

from dataclasses import dataclass

from tinygpt import fileio, rundir


@dataclass(frozen=True)
class Branch:
    """How a run is tied to others: where it begins, and what it keeps for those that follow."""

    trunk: rundir.RunDir | None = None
    step: int = 0  # of the trunk's checkpoint to begin with
    keep_at: tuple[int, ...] = ()  # steps at which others will branch off this run

    def is_ready(self) -> bool:
        """Whether the trunk has left the checkpoint to begin with."""
        return self.trunk is not None and self.trunk.step(self.step).exists()

    def begin(self, run: rundir.RunDir) -> None:
        """Gives ``run`` the trunk's state, measurements and samples up to the branch."""
        assert self.trunk is not None
        for mine, theirs in ((run.metrics, self.trunk.metrics), (run.samples, self.trunk.samples)):
            if theirs.exists():
                fileio.copy(theirs, mine)
        fileio.copy(self.trunk.step(self.step), run.last)  # last: with it the run can be resumed
