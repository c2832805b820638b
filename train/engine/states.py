"""An update, and the state of model and optimizer by parameter name: the same names under every engine."""

import math
from typing import Any

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


def update(optimizer: torch.optim.Optimizer, lr: float, norm: float) -> None:
    """A step of the optimizer, unless the norm of the gradients is not finite; clears them."""
    for group in optimizer.param_groups:
        group["lr"] = lr
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()


def saved_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Tensors, or DTensors where they are sharded: {"model": ..., "optim": ...}."""
    fresh = not optimizer.state
    optim = get_optimizer_state_dict(model, optimizer)
    if fresh:
        # torch made the state by a step with zero gradients, which a run that starts here must not count
        optimizer.state.clear()
    return {"model": get_model_state_dict(model), "optim": optim["state"]}


def load_state(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Takes back what `saved_state` gave."""
    set_model_state_dict(model, state["model"])
    groups = get_optimizer_state_dict(model, optimizer)["param_groups"]
    set_optimizer_state_dict(model, optimizer, {"state": state["optim"], "param_groups": groups})
