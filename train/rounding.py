"""Weights that rest in bfloat16: updated in float32 one at a time, and rounded up or down by chance."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from .engine.protocol import Build
from .engine.states import local
from .singly import Groups, Singly

# how often a weight was rounded, which seeds the next time: a run that goes on rounds as if it never stopped
ROUNDS = "rounds"


def stochastic(x: Tensor, generator: torch.Generator) -> Tensor:
    """bfloat16 of float32 `x`: of the two neighbours, the farther one with the probability of the nearer's
    distance, so that the mean over many roundings is x (Zamirai et al. 2020, section 3). What bfloat16 holds,
    infinities and NaN are as they were.
    """
    bits = x.contiguous().view(torch.int32)
    noise = torch.randint(1 << 16, bits.shape, generator=generator, dtype=torch.int32, device=x.device)
    rounded = ((bits + noise) & -(1 << 16)).view(torch.float32).to(torch.bfloat16)
    return torch.where(x.isfinite(), rounded, x.to(torch.bfloat16))


class Rounded(Singly):
    """Another optimizer over bfloat16 weights. Its state is float32; so is, for the time of its update, the
    weight that it updates.

    kind: its class; the groups say all that it is told. seed: of the rounding, which ranks that hold the same
    weights do alike. host: its state rests in host memory.
    """

    def __init__(
        self, groups: Groups, kind: Callable[[Groups], torch.optim.Optimizer], seed: int, *,
        host: bool = False,
    ) -> None:  # fmt: skip
        self.seed = seed
        super().__init__(groups, kind, host=host)

    def update(self, p: nn.Parameter, group: dict[str, Any], number: int) -> None:
        state = dict(self.state[p])
        rounds = state.pop(ROUNDS, torch.zeros((), dtype=torch.int64))
        weight = nn.Parameter(p.detach().float())
        weight.grad = p.grad.float()  # type: ignore[union-attr]
        state = self.stepped(weight, group, state)
        seed = hash((self.seed, number, int(rounds), *_part(p))) & (2**63 - 1)
        generator = torch.Generator(p.device).manual_seed(seed)
        local(p).copy_(stochastic(local(weight.detach()), generator))
        self.state[p] = {**state, ROUNDS: rounds + 1}


def rounded(build: Build, seed: int, *, host: bool = False) -> Build:
    """What `build` would build, for weights that rest in bfloat16; host: its state in host memory."""

    def building(model: nn.Module) -> torch.optim.Optimizer:
        plain = build(model)
        # its groups say all that it was told
        return Rounded(plain.param_groups, type(plain), seed, host=host)

    return building


def _part(p: Tensor) -> tuple[int, ...]:
    """Which part of a weight this rank holds, so that no two are rounded alike; replicas are."""
    if not isinstance(p, DTensor):
        return ()
    at = p.device_mesh.get_coordinate() or ()
    return tuple(i for i, x in zip(at, p.placements, strict=True) if not x.is_replicate())
