"""The optimizer with its parameter groups, and the learning rate of each step."""

from collections.abc import Callable
from dataclasses import dataclass
from math import cos, inf, pi
from typing import Any, Literal

import torch
from torch import nn


@dataclass(frozen=True)
class Optim:
    """optimizer: a torch optimizer class waiting for its parameters. weight_decay falls on matrices only, not
    on embeddings.

    schedule: `cosine` from lr to lr * floor after `warmup` linear steps; `wsd` (warm-up, stable, decay: Hu et
    al. 2024, section 4) keeps lr and falls linearly to lr * floor over the last `decay` steps; `constant`
    after the warm-up.
    """

    optimizer: Callable[..., torch.optim.Optimizer]
    lr: float
    weight_decay: float = 0.1
    schedule: Literal["cosine", "wsd", "constant"] = "cosine"
    warmup: int = 0
    decay: int = 0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.schedule not in ("cosine", "wsd", "constant"):
            raise ValueError(f"optim.schedule is {self.schedule!r}; it can be cosine, wsd or constant")
        if not 0 < self.lr < inf or not 0 <= self.weight_decay < inf:
            raise ValueError(
                f"optim.lr is {self.lr}, optim.weight_decay {self.weight_decay}; lr > 0, weight_decay >= 0"
            )
        if self.warmup < 0 or self.decay < 0 or not 0 <= self.floor <= 1:
            raise ValueError(
                f"optim.warmup {self.warmup} and optim.decay {self.decay} must be at least 0, "
                f"optim.floor {self.floor} from 0 to 1"
            )

    def build(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimizer over what learns of the model in two groups, with and without weight decay."""
        embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
        decayed: list[nn.Parameter] = []
        plain: list[nn.Parameter] = []
        for p in (p for p in model.parameters() if p.requires_grad):
            (decayed if p.ndim >= 2 and id(p) not in embeddings else plain).append(p)
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        try:
            return self.optimizer([g for g in groups if g["params"]], lr=self.lr)
        except (TypeError, ValueError) as error:
            raise ValueError(f"optim.optimizer cannot be built: {error}") from None

    def lr_at(self, step: int, steps: int) -> float:
        """Learning rate of step `step` (from 0) of `steps`."""
        if step < self.warmup:
            return self.lr * (step + 1) / self.warmup
        if self.schedule == "constant":
            return self.lr
        if self.schedule == "cosine":
            done = (step - self.warmup) / max(1, steps - self.warmup)
            return self.lr * (self.floor + (1 - self.floor) * (1 + cos(pi * min(1.0, done))) / 2)
        left = (steps - step) / max(1, self.decay)
        return self.lr * (self.floor + (1 - self.floor) * min(1.0, left))
