"""Bad steps: a loss or gradient norm that is not finite, or far above those before, and what is done then."""

from collections.abc import Sequence
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any, Literal, get_args

import torch.distributed as dist

from .agree import highest
from .data.sample import Sourced
from .lines import append
from .metrics import json_value

Kind = Literal["nonfinite", "spike"]
Policy = Literal["stop", "skip", "rewind"]
Off = Literal["off"]
FAULTS = "faults.jsonl"
# the worse of two has the higher number, which is what ranks that disagree take
KINDS: tuple[Kind | None, ...] = (None, "spike", "nonfinite")


class Diverged(RuntimeError):
    """A step went bad, and the run stops."""


class Guard:
    """Tells bad steps, and counts them: one object a run.

    `stop` ends the run; `skip` leaves weights, optimizer and average as they are, and the step counts;
    `rewind` goes back to the newest checkpoint and on with the samples after the bad ones, so that those
    since the checkpoint are not seen again (PaLM: Chowdhery et al. 2022, section 5.1).

    nonfinite: what is done about a loss or gradient norm that is not finite. spike: about one that is more
    than `factor` times the median of the last `window` good steps, of which there must be half as many.
    most: bad steps in a row, and rewinds without a new checkpoint, that may be; one more stops the run.
    """

    def __init__(
        self, *, nonfinite: Policy = "stop", spike: Off | Policy = "off", factor: float = 3.0,
        window: int = 50, most: int = 5,
    ) -> None:  # fmt: skip
        for name, value, can in (("nonfinite", nonfinite, ()), ("spike", spike, get_args(Off))):
            if value not in (*can, *get_args(Policy)):
                choices = ", ".join((*can, *get_args(Policy)))
                raise ValueError(f"guard.{name} is {value!r}; it can be {choices}")
        if not 1 < factor < float("inf"):
            raise ValueError(f"guard.factor is {factor}; it must be more than 1")
        if window < 2 or most < 1:
            raise ValueError(
                f"guard.window is {window}, guard.most {most}; window must be at least 2, most at least 1"
            )
        self.policies: dict[Kind, Off | Policy] = {"nonfinite": nonfinite, "spike": spike}
        self.factor, self.window, self.most = factor, window, most
        self._in_row = self._rewinds = 0

    def judged(self, loss: float, norm: float, good: list[list[float]]) -> Kind | None:
        """What is bad about a step, on all ranks alike; all call it. good: as `passed` keeps it."""
        kind = self._kind(loss, norm, good)
        if dist.get_world_size() == 1:
            return kind
        return KINDS[highest(KINDS.index(kind))]

    def _kind(self, loss: float, norm: float, good: list[list[float]]) -> Kind | None:
        if not (isfinite(loss) and isfinite(norm)):
            return "nonfinite"
        if self.policies["spike"] == "off" or len(good) < max(1, self.window // 2):
            return None
        limits = [self.factor * median(column) for column in zip(*good, strict=True)]
        # a loss may be negative, of which no multiple says anything
        above = any(0 < limit < value for value, limit in zip((loss, norm), limits, strict=True))
        return "spike" if above else None

    def passed(self, loss: float, norm: float, good: list[list[float]]) -> None:
        """Notes a good step. good: loss and gradient norm of the last `window`, which a checkpoint keeps."""
        self._in_row = 0
        if self.policies["spike"] != "off":
            good.append([loss, norm])
            del good[: -self.window]

    def saved(self) -> None:
        """Notes a whole checkpoint, to which the next rewind goes."""
        self._rewinds = 0

    def answer(self, kind: Kind) -> tuple[Policy, str]:
        """What is done about a bad step, and why, if the run stops."""
        self._in_row += 1
        policy = self.policies[kind]
        assert policy != "off"
        if policy == "stop":
            return "stop", f"guard.{kind} is stop; skip or rewind would go on"
        if self._in_row > self.most:
            return "stop", f"{self._in_row} bad steps in a row, and guard.most is {self.most}"
        if policy == "rewind":
            self._rewinds += 1
            if self._rewinds > self.most:
                told = f"guard.most is {self.most}, and so many rewinds were made"
                return "stop", f"{told} since the last new checkpoint"
        return policy, ""

    def words(self, kind: Kind, loss: float, norm: float, good: list[list[float]]) -> str:
        """What is bad about a step, in words."""
        told = f"loss {loss}, gradient norm {norm}"
        if kind == "nonfinite" or not good:
            return told
        usual = " and ".join(f"{median(column):.4g}" for column in zip(*good, strict=True))
        return f"{told}, but {usual} in the median of {len(good)} good steps (guard.factor={self.factor})"


class Faults:
    """faults.jsonl in a run folder: a line for each bad step. A disk that does not take it stops nobody."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, row: dict[str, Any]) -> str:
        """Appends the row with the time (seconds since 1970); what went wrong, or nothing."""
        floats = {name: json_value(name, x) for name, x in row.items() if isinstance(x, float)}
        try:
            append(self.path, row | floats)
        except OSError as error:
            return f"{self.path} cannot be written: {error.strerror or error}"
        return ""


def sources(data: Any, wanted: Sequence[int]) -> dict[str, Any]:
    """The samples with these global indices, and which documents of the corpus each is made of, if the data
    can tell.
    """
    found: dict[str, Any] = {"ids": list(wanted)}
    if isinstance(data, Sourced):
        found["documents"] = [data.documents_of(index) for index in wanted]
    return found
