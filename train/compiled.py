"""torch.compile of a model's blocks, each by itself: attention stays what the layout makes of it."""

from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from omegaconf import DictConfig
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from .engine.ddp import DDP
from .engine.deepspeed import DeepSpeed
from .engine.fsdp import FSDP
from .engine.protocol import Engine


def check(cfg: DictConfig, engine: Engine, mesh: DeviceMesh) -> None:
    """ValueError, saying what would work, if blocks cannot be compiled in this job."""
    said = "train.compile is true"
    if isinstance(engine, DeepSpeed) and engine.stage == 3:
        raise ValueError(f"{said}; engine.stage=3 gathers weights inside of blocks: take engine.stage=2")
    if not isinstance(engine, DDP | FSDP | DeepSpeed):
        raise ValueError(f"{said}; {type(engine).__name__} runs layers of its own: take engine=ddp or fsdp")
    if mesh["tp"].size() > 1:
        degree = mesh["tp"].size()
        raise ValueError(f"{said}; with parallel.mesh.tp={degree} ranks trade tokens in blocks: set tp=1")
    for name, none in (("mlp_tile", 0), ("head_chunks", 1)):
        if cfg.memory.get(name, none) != none:
            raise ValueError(
                f"{said}; memory.{name}={cfg.memory[name]} walks a graph of its own in the backward, "
                f"which cannot be traced: set memory.{name}={none}"
            )


def compile_blocks(model: nn.Module, backend: str = "inductor") -> None:
    """Compiles how `model.blocks` run, before anything is put around that: blocks of the same kind share what
    was compiled. Names of parameters stay.
    """
    for block in model.blocks:  # type: ignore[union-attr]
        block.forward = _apart(torch.compile(block.forward, backend=backend))


def _apart(run: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any) -> Any:
        given = (_Opaque(a) if callable(a) and not isinstance(a, nn.Module) else a for a in args)
        # each block is a graph already, which DDP's buckets must not cut once more
        with torch._dynamo.config.patch(optimize_ddp=False):
            return run(*given)

    return forward


class _Opaque:
    """An `attend` that is called as it is, between two graphs; one object is like another to a guard."""

    def __init__(self, attend: Callable[..., Any]) -> None:
        self.attend = attend

    @torch.compiler.disable
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.attend(*args, **kwargs)
