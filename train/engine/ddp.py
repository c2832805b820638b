"""The embedded engine: every rank holds all weights; torch's DistributedDataParallel sums gradients over dp x
ring x head.
"""

import math
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ...kernels.concrete import concrete
from .protocol import Build, May
from .states import load_state, saved_state, total_norm, update

AXES = ("dp", "ring", "head")


class DDP:
    """bucket_mb: size of a gradient bucket. 0 reduces each parameter alone where more than two ranks sum:
    only then are sums in the same order before and after a resume, and losses bit-equal at any number of
    ranks (two ranks have but one order, and get buckets of torch's size). init_sync: rank 0's weights are
    handed to all at the start, after a check that their shapes agree; without it they are those of the seed.
    """

    def __init__(self, *, bucket_mb: float = 0.0, init_sync: bool = True) -> None:
        if bucket_mb < 0:
            raise ValueError(f"engine.bucket_mb is {bucket_mb}; it must be at least 0")
        self.bucket_mb, self.init_sync = bucket_mb, init_sync

    def wrap(self, objective: nn.Module, build: Build, mesh: DeviceMesh) -> None:
        if mesh["tp"].size() > 1:
            raise ValueError(
                f"parallel.mesh.tp is {mesh['tp'].size()}; engine=ddp holds whole weights, so it must be 1, "
                "or take engine=fsdp"
            )
        self.objective = objective
        self.model: nn.Module = objective.model  # type: ignore[assignment]
        self.optimizer = build(self.model)
        self.runner = objective
        if dist.get_world_size() > 1:
            group = concrete(mesh[AXES]._flatten)("weights").get_group()
            apart = not self.bucket_mb and group.size() > 2
            ddp = DistributedDataParallel(
                objective, process_group=group, bucket_cap_mb=1e-6 if apart else self.bucket_mb or None,
                init_sync=self.init_sync,
            )  # fmt: skip
            ddp.register_comm_hook(_Over(group, apart), _sum)
            self.runner = ddp

    def backward(self, *inputs: Any, last: bool) -> Tensor:
        held = (
            self.runner.no_sync()
            if isinstance(self.runner, DistributedDataParallel) and not last
            else nullcontext()
        )
        with held:
            loss: Tensor = self.runner(*inputs)
            loss.backward()
        return loss.detach()

    def step(self, lr: float, clip: float, may: May = math.isfinite) -> float:
        norm = total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
        update(self.optimizer, lr, norm, clip, may)
        return norm

    def save(self) -> dict[str, Any]:
        return saved_state(self.model, self.optimizer)

    def load(self, state: dict[str, Any]) -> None:
        load_state(self.model, self.optimizer, state)


class _Over(NamedTuple):
    """Over which ranks gradients are summed, and whether each by itself."""

    group: dist.ProcessGroup
    apart: bool


def _sum(over: _Over, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """A comm hook that adds instead of averaging: each rank's loss is already its share of the global mean.

    Apart, because DDP has all gradients in one bucket in its first step, and how a number is summed over more
    than two ranks depends on where in its bucket it stands. In float32 at least, rounded once.
    """
    whole, sums = bucket.buffer(), []
    for part in bucket.gradients() if over.apart else [whole]:
        wide = part.to(torch.promote_types(part.dtype, torch.float32))
        work = dist.all_reduce(wide, group=over.group, async_op=True)
        assert work is not None
        future = work.get_future()
        sums.append(future if wide is part else future.then(partial(_put, part, wide)))
    return torch.futures.collect_all(sums).then(lambda _: whole)


def _put(part: Tensor, wide: Tensor, _: torch.futures.Future[Tensor]) -> Tensor:
    return part.copy_(wide)
