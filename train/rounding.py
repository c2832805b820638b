"""Weights that rest in bfloat16: updated in float32 one at a time, and rounded up or down by chance."""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .engine.protocol import Build
from .engine.states import local

# how often a weight was rounded, which seeds the next time: a run that goes on rounds as if it never stopped
ROUNDS = "rounds"
Groups = list[dict[str, Any]]


def stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 of float32 `x`: of the two neighbours, the farther one with the probability of the nearer's
    distance, so that the mean over many roundings is x (Zamirai et al. 2020, section 3). What bfloat16 holds,
    infinities and NaN are as they were.
    """
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


class Rounded(torch.optim.Optimizer):
    """Another optimizer over bfloat16 weights. Its state is float32; so is, for the time of its update, the
    weight that it updates.

    kind: its class; the groups say all that it is told. seed: of the rounding, which ranks that hold the same
    weights do alike.
    """

    def __init__(self, groups: Groups, kind: Callable[[Groups], torch.optim.Optimizer], seed: int) -> None:
        self.seed = seed
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
                    self._update(p, group, number)
                number += 1

    def _update(self, p: nn.Parameter, group: dict[str, Any], number: int) -> None:
        state = self.state[p]
        rounds = state.pop(ROUNDS, torch.zeros((), dtype=torch.int64))
        weight = nn.Parameter(p.detach().float())
        weight.grad = p.grad.float()  # type: ignore[union-attr]
        self.inner.param_groups = [group | {"params": [weight]}]
        self.inner.state = defaultdict(dict, {weight: dict(state)} if state else {})
        self.inner.step()
        seed = hash((self.seed, number, int(rounds), *_part(p))) & (2**63 - 1)
        generator = torch.Generator(p.device).manual_seed(seed)
        local(p).copy_(stochastic(local(weight.detach()), generator))
        state.update(self.inner.state[weight], **{ROUNDS: rounds + 1})
        self.inner.param_groups, self.inner.state = [], defaultdict(dict)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As torch's, which would make the state bfloat16 like the weights."""
        kept = {i: dict(s) for i, s in state_dict["state"].items()}
        super().load_state_dict(state_dict)
        order = [p for group in self.param_groups for p in group["params"]]
        names = [i for group in state_dict["param_groups"] for i in group["params"]]
        for i, p in zip(names, order, strict=True):
            if i in kept:
                self.state[p] = kept[i]


def rounded(build: Build, seed: int) -> Build:
    """What `build` would build, for weights that rest in bfloat16."""

    def building(model: nn.Module) -> torch.optim.Optimizer:
        plain = build(model)
        # its groups say all that it was told
        return Rounded(plain.param_groups, type(plain), seed)

    return building


def _part(p: Tensor) -> tuple[int, ...]:
    """Which part of a weight this rank holds, so that no two are rounded alike; replicas are."""
    if not isinstance(p, DTensor):
        return ()
    at = p.device_mesh.get_coordinate() or ()
    return tuple(i for i, x in zip(at, p.placements, strict=True) if not x.is_replicate())
