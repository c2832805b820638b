"""An update, and the state of model and optimizer by parameter name: the same names under every engine."""

import math
from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import Placement

from .protocol import May


def update(
    optimizer: torch.optim.Optimizer, lr: float, norm: float, clip: float = 0.0, may: May = math.isfinite
) -> None:
    """A step of the optimizer, with gradients scaled down to the norm `clip` if theirs, `norm`, is greater
    (0: never), if `may` allows one of this norm; clears them.
    """
    for group in optimizer.param_groups:
        group["lr"] = lr
        for p in group["params"] if clip and norm > clip else ():
            if p.grad is not None:
                local(p.grad).mul_(clip / (norm + 1e-6))
    if may(norm):
        optimizer.step()
    optimizer.zero_grad()


def total_norm(grads: Sequence[Tensor]) -> float:
    """The 2-norm of all gradients together, in float32 at least; of a DTensor each rank has its shard."""
    squares: dict[tuple[DeviceMesh | None, tuple[Placement, ...]], Tensor] = {}
    for grad in grads:
        key = (grad.device_mesh, grad.placements) if isinstance(grad, DTensor) else (None, ())
        square = local(grad).to(torch.promote_types(grad.dtype, torch.float32)).square().sum()
        squares[key] = squares[key] + square if key in squares else square
    for (mesh, placements), square in squares.items():
        for axis, placement in enumerate(placements):
            if mesh is not None and not placement.is_replicate():
                dist.all_reduce(square, group=mesh.get_group(axis))
    return float(sum(float(x) for x in squares.values()) ** 0.5)


def local(x: Tensor) -> Tensor:
    """What this rank holds of it."""
    return x.to_local() if isinstance(x, DTensor) else x


def saved_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Tensors, or DTensors where they are sharded: {"model": ..., "optim": ...}."""
    fresh = not optimizer.state
    optim = get_optimizer_state_dict(model, optimizer)
    if fresh:
        # torch made the state by a step with zero gradients, which must not count: neither in a run that
        # starts here, nor in one that goes on from this as its checkpoint
        optimizer.state.clear()
        for kept in cast(dict[str, dict[str, Any]], optim["state"]).values():
            for x in kept.values():
                if isinstance(x, Tensor):
                    local(x).zero_()
    return {"model": get_model_state_dict(model), "optim": optim["state"]}


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes back what `saved_state` gave."""
    set_model_state_dict(model, state["model"])
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state["optim"], "param_groups": groups})
