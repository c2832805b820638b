"""The exponential moving average of a model's weights, in float32, whole or sharded as the weights are."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .engine.protocol import Weights
from .engine.states import local


class EMA:
    """average <- d average + (1 - d) weights, with d = min(decay, (1 + n) / (10 + n)) in update n, from 0: so
    the start is soon forgotten.

    Elementwise on what a rank holds, so sharded weights (DTensor) have an average that is sharded alike.

    Args:
        model: Whose parameters are followed, from what they are now.
        decay: 0 is no average, 0.9999 usual for long runs.
        warmup: Whether d begins low.
        apart: What the engine holds, if that is not the model's parameters.

    Raises:
        ValueError: `decay` is out of its range.
    """

    def __init__(
        self, model: nn.Module, *, decay: float = 0.9999, warmup: bool = True, apart: Weights | None = None
    ) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"ema.decay is {decay}; it must be from 0 to less than 1")
        self.decay, self.warmup, self.updates = decay, warmup, 0
        self.apart = apart
        self.weights = {name: _exact(x).clone() for name, x in self._held(model).items()}

    def rate(self) -> float:
        """The d of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates)) if self.warmup else self.decay

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Takes in the weights as they are now; once after each optimizer step, on every rank."""
        share = 1.0 - self.rate()
        for name, x in self._held(model).items():
            average = local(self.weights[name])
            average.lerp_(local(x).to(average.dtype), share)
        self.updates += 1

    @contextmanager
    def applied(self, model: nn.Module) -> Iterator[None]:
        """The model with the averaged weights; its own come back, bit for bit, whatever happens."""
        own = {name: local(x).clone() for name, x in self._held(model).items()}
        try:
            self._put(model, self.weights)
            yield
        finally:
            self._put(model, own)

    def _held(self, model: nn.Module) -> dict[str, Tensor]:
        held = dict(model.named_parameters()) if self.apart is None else self.apart.held()
        return {name: x.detach() for name, x in held.items()}

    @torch.no_grad()
    def _put(self, model: nn.Module, weights: dict[str, Tensor]) -> None:
        for name, x in self._held(model).items():
            local(x).copy_(local(weights[name]))
        if self.apart is not None:
            self.apart.changed()

    def state(self) -> dict[str, Any]:
        """Tensors for a checkpoint, also as the template that one is loaded into."""
        named = self.weights if self.apart is None else self.apart.named(self.weights)
        return {"weights": named, "updates": torch.tensor(self.updates)}

    @torch.no_grad()
    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave.

        Raises:
            ValueError: It is the average of a model with other parameters.
        """
        self.updates = int(state["updates"])
        if self.apart is not None:
            self.apart.take(self.weights, state["weights"])
            return
        if other := sorted(state["weights"].keys() ^ self.weights.keys()):
            raise ValueError(f"the saved average is of another model: {other[0]} is in one of them only")
        for name, average in self.weights.items():
            local(average).copy_(local(state["weights"][name]))


def _exact(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
