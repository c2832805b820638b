"""An optimizer that takes one weight at a time, so that what it keeps of the others may rest elsewhere."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .engine.protocol import Build

Groups = list[dict[str, Any]]
State = dict[str, Any]


class Singly(torch.optim.Optimizer):
    """Another optimizer, with the same updates, one weight after the other.

    kind: its class; the groups say all that it is told. host: what it keeps of a weight comes to the weight's
    device for its update only, and rests in host memory, pinned if that device is no CPU (ZeRO-Offload: Ren
    et al. 2021, but for where the update is made). For whole weights, not DTensors.
    """

    def __init__(
        self, groups: Groups, kind: Callable[[Groups], torch.optim.Optimizer], *, host: bool = False
    ) -> None:
        self.host = host
        self.inner = kind([group | {"params": [nn.Parameter(torch.empty(0))]} for group in groups])
        told = [
            {**inner, "params": group["params"]}
            for inner, group in zip(self.inner.param_groups, groups, strict=True)
        ]
        super().__init__(told, {})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One update of all weights that have a gradient."""
        number = 0
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    self.update(p, group, number)
                number += 1

    def update(self, p: nn.Parameter, group: dict[str, Any], number: int) -> None:
        """Of one weight, the `number`-th of all."""
        self.state[p] = self.stepped(p, group, self.state[p])

    def stepped(self, weight: nn.Parameter, group: dict[str, Any], state: State) -> State:
        """Updates a weight by its gradient; the state that is kept of it, which was `state`."""
        near = {name: x.to(weight.device) if self._moves(x) else x for name, x in state.items()}
        self.inner.param_groups = [group | {"params": [weight]}]
        self.inner.state = defaultdict(dict, {weight: near} if near else {})
        self.inner.step()
        found = self.inner.state[weight]
        self.inner.param_groups, self.inner.state = [], defaultdict(dict)
        return {name: self._away(x, state.get(name)) if self._moves(x) else x for name, x in found.items()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would give the state the weights' dtype and device."""
        super().load_state_dict(state_dict | {"state": {}})
        order = [p for group in self.param_groups for p in group["params"]]
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(names, order, strict=True):
            if i in state_dict["state"]:
                self.state[p] = dict(state_dict["state"][i])

    def _moves(self, x: Any) -> bool:
        # a count of steps is on the CPU in any case
        return self.host and isinstance(x, Tensor) and x.ndim > 0

    @staticmethod
    def _away(x: Tensor, kept: Tensor | None) -> Tensor:
        if kept is None:
            kept = torch.empty_like(x, device="cpu", pin_memory=x.device.type != "cpu")
        return kept if kept is x else kept.copy_(x)


def singly(build: Build) -> Build:
    """What `build` would build, with its state in host memory."""

    def building(model: nn.Module) -> torch.optim.Optimizer:
        plain = build(model)
        return Singly(plain.param_groups, type(plain), host=True)

    return building
