"""The exponential moving average of a model's weights, in float32, whole or sharded as the weights are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .engine.states import local


class EMA:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) in update n, from 0: so
    the start is soon forgotten.

    Elementwise on what a rank holds, so sharded weights (DTensor) have an average that is sharded alike.

    Args:
        model: Whose parameters are followed, from what they are now.
        decay: 0 is no average, 0.9999 usual for long runs.
        warmup: Whether d begins low.

    Raises:
        ValueError: `decay` is out of its range, or the weights are in flat pieces (DeepSpeed's stage 3).
    """

    def __init__(self, model: nn.Module, *, decay: float = 0.9999, warmup: bool = True) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay is {decay}; it must be from 0 to less than 1")
        for mark, engine in (("ds_id", "engine.stage=3"), ("whole_numel", "engine=megatron")):
            if any(hasattr(p, mark) for p in model.parameters()):
                raise ValueError(
                    f"train.ema is {decay}, but {engine} leaves no whole weights to average: take "
                    f"engine.stage=2 or engine=fsdp"
                )
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.weights = {name: _exact(p.detach()).clone() for name, p in model.named_parameters()}

    def rate(self) -> float:
        """The d of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights as they are now; once after each optimizer step, on every rank."""
        share = 1.0 - self.rate()
        for name, p in model.named_parameters():
            average = local(self.weights[name])
            average.lerp_(local(p.detach()).to(average.dtype), share)
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights; its own come back, bit for bit, whatever happens."""
        own = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
        try:
            self._put(model, self.weights)
            yield
        finally:
            self._put(model, own)

    @staticmethod
    @torch.no_grad()
    def _put(model: nn.Module, weights: dict[str, Tensor]) -> None:
        for name, p in model.named_parameters():
            local(p.detach()).copy_(local(weights[name]))

    def state(self) -> dict[str, Any]:
        """Tensors for a checkpoint, also as the template that one is loaded into."""
        return {"weights": self.weights, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave.

        Raises:
            ValueError: It is the average of a model with other parameters.
        """
        if other := sorted(state["weights"].keys() ^ self.weights.keys()):
            raise ValueError(f"the saved average is of another model: {other[0]} is in one of them only")
        for name, average in self.weights.items():
            local(average).copy_(local(state["weights"][name]))
        self.updates = int(state["updates"])


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
