"""What a run's results are worth: the seam between the loop, which trains anything, and what it trains."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .job import Job


class Judge(Protocol):
    """All ranks call `held_out` and `finish`; what they return is the same on all."""

    def held_out(self, job: Job, samples: int) -> dict[str, float]:
        """The loss on the first `samples` of the held-out data, `eval_loss`, and what else is worth
        watching while it trains.
        """
        ...

    def words(self, row: Mapping[str, float]) -> str:
        """What `held_out` gave, for people."""
        ...

    def show(self, job: Job, folder: Path, step: int) -> dict[str, Path]:
        """Pictures of the moment in the run's folder, by name, rank 0's count; none for many."""
        ...

    def facts(self, job: Job) -> str:
        """What the data is, in a line."""
        ...

    def finish(self, loop: Any, folder: Path, samples: int) -> dict[str, Any]:
        """The last evaluation, told to the `Loop`, with its pictures; entries of the summary (rank 0's)."""
        ...

    def headline(self, summary: Mapping[str, Any], folder: Path) -> dict[str, str]:
        """The result in a few lines for people: {name: text}."""
        ...
