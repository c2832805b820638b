"""States such as a trainer saves, made from a seed, and their comparison bit for bit."""

import contextlib
import resource
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.train.checkpoint import Checkpoints

State = dict[str, Any]


def make(seed: int, rows: int = 5) -> State:
    """Every kind of tensor that a trainer may hold; `model.weight` is [rows, 6]."""
    draw = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, 6, generator=draw)
    weight[0, :3] = torch.tensor([float("nan"), -0.0, float("inf")])
    return {
        "model": {
            "weight": weight,
            "tied": weight[1:],
            "turned": torch.randn(4, 3, generator=draw).T,
            "half": torch.randn(7, generator=draw).to(torch.bfloat16),
            "none": torch.empty(0, 3),
        },
        "optim": {0: {"step": torch.tensor(float(seed)), "mean": torch.randn(2, 2, generator=draw).double()}},
        "random": draw.get_state(),
    }


def leaves(state: State) -> Iterator[Tensor]:
    for value in state.values():
        yield from leaves(value) if isinstance(value, dict) else [value]


def blank(state: State) -> State:
    return {k: blank(v) if isinstance(v, dict) else torch.zeros_like(v) for k, v in state.items()}


def bits(state: State) -> list[bytes]:
    return [t.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes() for t in leaves(state)]


def tree(folder: Path) -> dict[str, bytes]:
    """All files below `folder` and what they hold."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def loaded(folder: Path, like: State, which: str = "auto") -> tuple[list[bytes], State | None]:
    """What this process, on its own and without a warning, loads from `folder`: tensors' bits and extra."""
    state = blank(like)
    extra = Checkpoints(folder, warn=pytest.fail).load(which, state)
    return bits(state), extra


def save(checkpoints: Checkpoints, step: int) -> None:
    """Saves `make(step)` and waits for it."""
    checkpoints.save(step, make(step), {"saved": step})
    checkpoints.wait()


@contextlib.contextmanager
def small_files(limit: int) -> Iterator[None]:
    """The kernel refuses to let a file grow beyond `limit` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
