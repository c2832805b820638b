"""What launch.chaos starts instead of longspan.train: the same, with a fault planted in one rank by the hooks
that torch and Python have for everybody.

python -m longspan.launch.chaos_rank kill forward 10 1 0 NOTE : experiment=tiny ...
"""

import json
import os
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.optim.optimizer import register_optimizer_step_pre_hook

from ..train.__main__ import main as train
from ..train.objective.protocol import Objective

SENT = {
    "kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM, "usr1": signal.SIGUSR1,
}  # fmt: skip
# what the rank's share of the loss is multiplied by
SCALED = {"nan": float("nan"), "spike": 100.0}
# ends the words that say the strike; torchrun would take -- for itself
END = ":"
PLACES = ("forward", "backward", "optimizer", "save")


@dataclass(frozen=True)
class Strike:
    """act: a signal of SENT, which the rank sends itself or, as `term-launcher`, its launcher; or one of
    SCALED, which spoils the rank's loss of one step.

    place: of PLACES, in step `step` of this process, the first being 1; in a save, the step is the save's
    number, and `after` the seconds since it began. note: a file that gets the time of the strike.
    """

    act: str
    place: str
    step: int
    rank: int
    after: float
    note: Path

    def words(self) -> list[str]:
        """The words of the command line that say it."""
        return [self.act, self.place, str(self.step), str(self.rank), str(self.after), str(self.note)]

    @classmethod
    def of(cls, words: list[str]) -> "Strike":
        """What `words` gave. ValueError for what cannot be."""
        act, place, step, rank, after, note = words
        strike = cls(act, place, int(step), int(rank), float(after), Path(note))
        if act.removesuffix("-launcher") not in (*SENT, *SCALED) or place not in PLACES:
            raise ValueError(f"{act} {place}: give one of {', '.join((*SENT, *SCALED))} in {PLACES}")
        return strike


class Planted:
    """A strike that waits for its step."""

    def __init__(self, strike: Strike) -> None:
        self.strike = strike
        self.steps = self.saves = 0
        self.done = False

    def plant(self) -> None:
        """Hangs it into what this process will do."""
        register_module_forward_pre_hook(self._begins)
        register_module_forward_hook(self._ended)
        register_optimizer_step_pre_hook(self._updates)
        sys.addaudithook(self._seen)

    @property
    def _due(self) -> bool:
        return not self.done and self.steps == self.strike.step

    def _begins(self, module: nn.Module, inputs: Any) -> None:
        self.steps += _objective(module)

    def _ended(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self._due:
            return None
        if self.strike.act in SCALED:
            if _objective(module):
                self._struck()
                return output * SCALED[self.strike.act]
        elif self.strike.place == "forward":
            # the first part of the model is done, the rest is not
            self._strike()
        elif self.strike.place == "backward" and _block(module) and isinstance(output, Tensor):
            # the gradient comes when those of the blocks after it are there
            self.done = True
            output.register_hook(lambda gradient: self._strike())
        return None

    def _updates(self, optimizer: torch.optim.Optimizer, inputs: Any, named: Any) -> None:
        if self._due and self.strike.place == "optimizer":
            self._strike()

    def _seen(self, event: str, words: tuple[Any, ...]) -> None:
        """An audit hook: a save begins with a folder of its own."""
        if event == "os.mkdir" and self.strike.place == "save" and ".tmp-step-" in str(words[0]):
            self.saves += 1
            if not self.done and self.saves == self.strike.step:
                self.done = True
                Thread(target=self._later, daemon=True).start()

    def _later(self) -> None:
        time.sleep(self.strike.after)
        self._strike()

    def _strike(self) -> None:
        self._struck()
        act, _, launcher = self.strike.act.partition("-")
        os.kill(os.getppid() if launcher else os.getpid(), SENT[act])
        if launcher:
            # which needs a moment to pass it on, where steps take milliseconds
            time.sleep(1.0)

    def _struck(self) -> None:
        self.done = True
        self.strike.note.write_text(json.dumps({"at": time.time(), "step": self.steps}))


def _objective(module: nn.Module) -> bool:
    """Whether its forward is that of a whole step: the others are parts of it. FSDP derives a class."""
    ours = Objective.__module__.removesuffix("protocol")
    return any(kind.__module__.startswith(ours) for kind in type(module).__mro__)


def _block(module: nn.Module) -> bool:
    return type(module).__name__.endswith("Block")


def main() -> None:
    """Plants the fault if it is this rank's, and trains."""
    at = sys.argv.index(END)
    strike = Strike.of(sys.argv[1:at]) if at > 1 else None
    sys.argv[1 : at + 1] = []
    if strike is not None and strike.rank == int(os.environ.get("RANK", "0")):
        Planted(strike).plant()
    train()


if __name__ == "__main__":
    main()
