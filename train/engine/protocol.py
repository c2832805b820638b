"""What carries a model through a step: gradients summed over the ranks that share weights, clipping, the
update, its state.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

Build = Callable[
    [nn.Module], torch.optim.Optimizer
]  # an optimizer over the parameters as the engine left them

May = Callable[[float], bool]


class Engine(Protocol):
    """One training engine. The objective returns this rank's *share* of the loss, so gradients are summed,
    never averaged.
    """

    def wrap(self, objective: nn.Module, build: Build, mesh: DeviceMesh) -> None:
        """Takes over a model (inside its objective) and builds its optimizer; gradients will be summed over
        dp x ring x head.
        """
        ...

    def backward(self, *inputs: Any, last: bool) -> Tensor:
        """objective(*inputs) and its backward; `last` marks the step's last micro batch, after which
        gradients are whole.
        """
        ...

    def step(self, lr: float, clip: float, may: May = math.isfinite) -> float:
        """One optimizer step at this learning rate, with gradients scaled down to the norm `clip` if theirs
        is greater (0: never). Returns the norm before. Clears the gradients.

        may: is asked once, on every rank, with that norm; if it says no, neither weights nor the optimizer's
        state change.
        """
        ...

    def save(self) -> dict[str, Any]:
        """Nested dict of tensors by parameter name, for a checkpoint, also as the template that one is loaded
        into.
        """
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `save` gave, after a checkpoint was read into it."""
        ...


@runtime_checkable
class Native(Protocol):
    """An engine that has checkpoints of its own kind as well."""

    def save_native(self, folder: Path, step: int) -> None:
        """Writes one into `folder`, if the engine was asked to. All ranks call it, after a step."""
        ...


class Weights(Protocol):
    """What a rank holds of a model's weights, where these are not parameters under their names."""

    def held(self) -> dict[str, Tensor]:
        """Float32 tensors, by names of their own."""
        ...

    def named(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Tensors that are like those of `held`, put together by parameter name, for a checkpoint."""
        ...

    def take(self, like: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
        """Fills them from what `named` gave."""
        ...

    def changed(self) -> None:
        """To be called when what `held` gave was written to, before the model is used."""
        ...


@runtime_checkable
class Apart(Protocol):
    """An engine that takes weights apart."""

    def weights(self) -> Weights | None:
        """None if they are the model's parameters after all."""
        ...
