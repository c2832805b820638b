"""FSDP2: weights, gradients and optimizer state sharded over the ranks that share them."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard

from ...kernels.concrete import concrete
from ...models.gpt import GPT
from ...parallel.mesh import spanned
from ..singly import Singly
from .protocol import Build, May
from .states import load_state, saved_state, total_norm, update
from .tensor_parallel import check, split

DType = Literal["float32", "bfloat16"]
# what an objective computes besides its forward, with whole weights too
FORWARDS = ("losses", "guesses", "say")


class FSDP:
    """Each block, and what is around the blocks, is gathered for its work and sharded again (ZeRO-3; Zhao et
    al. 2023).

    replicate: HSDP, sharded inside the context ranks of a sample and replicated over dp; else sharded over
    all. param_dtype: what weights are gathered in; reduce_dtype: what gradients are summed in; the shards
    stay float32. reshard: free a block's weights between forward and backward. prefetch: blocks whose weights
    are on the way while one works. offload: shards rest in CPU memory.
    """

    def __init__(
        self, *, replicate: bool = False, param_dtype: DType = "float32", reduce_dtype: DType = "float32",
        reshard: bool = True, prefetch: int = 1, offload: bool = False,
    ) -> None:  # fmt: skip
        for name, value in (("param_dtype", param_dtype), ("reduce_dtype", reduce_dtype)):
            if value not in get_args(DType):
                raise ValueError(f"engine.{name} is {value!r}; it can be float32 or bfloat16")
        if prefetch < 0:
            raise ValueError(f"engine.prefetch is {prefetch}; it must be at least 0")
        self.replicate, self.reshard, self.prefetch, self.offload = replicate, reshard, prefetch, offload
        # inputs keep their dtype: the angles of positions must not become bfloat16
        self.precision = MixedPrecisionPolicy(
            getattr(torch, param_dtype), getattr(torch, reduce_dtype), cast_forward_inputs=False
        )

    def wrap(self, objective: nn.Module, build: Build, mesh: DeviceMesh) -> None:
        model: nn.Module = objective.model  # type: ignore[assignment]
        over, layers = self._over(mesh)
        if layers is not None:
            check(model, layers.size())
            assert isinstance(model, GPT)
            split(model, layers)
        self.shared = 1 if layers is None else int(layers.size())
        blocks = list(model.blocks)  # type: ignore[arg-type]
        for block in blocks:
            self._shard(block, over, self.reshard)
        # what is outside the blocks is used by the objective too, at both ends of its forward
        self._shard(objective, over, False)
        for method in FORWARDS:
            if hasattr(objective, method):
                register_fsdp_forward_method(objective, method)
                setattr(objective, method, _resharded(objective, getattr(objective, method)))
        for module in objective.modules():
            if isinstance(module, FSDPModule):
                # each rank's loss is already its share of the global mean: gradients are added, not averaged
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(True)
        for i, block in enumerate(blocks if self.prefetch > 1 else ()):
            block.set_modules_to_forward_prefetch(blocks[i + 1 : i + 1 + self.prefetch])
            block.set_modules_to_backward_prefetch(blocks[max(0, i - self.prefetch) : i][::-1])
        assert isinstance(objective, FSDPModule)
        self.objective, self.model, self.optimizer = objective, model, build(model)
        if isinstance(self.optimizer, Singly) and self.optimizer.host:
            raise ValueError("memory.optimizer is host; with engine=fsdp set engine.offload=true instead")

    def backward(self, *inputs: Any, last: bool) -> Tensor:
        self.objective.set_requires_gradient_sync(last)
        self.objective.set_is_last_backward(last)
        loss: Tensor = self.objective(*inputs)
        loss.backward()
        # ranks that share layers have the same loss
        return loss.detach() / self.shared

    def step(self, lr: float, clip: float, may: May = math.isfinite) -> float:
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        norm = total_norm(grads)
        update(self.optimizer, lr, norm, clip, may)
        return norm

    def save(self) -> dict[str, Any]:
        return saved_state(self.model, self.optimizer)

    def load(self, state: dict[str, Any]) -> None:
        load_state(self.model, self.optimizer, state)

    @concrete
    def _over(self, mesh: DeviceMesh) -> tuple[DeviceMesh, DeviceMesh | None]:
        """The ranks that share weights: one axis, or dp that replicates beside the context that shards; and
        those that share layers, if any do.
        """
        kind, ranks = mesh.device_type, mesh.mesh.flatten(1, 2)  # [dp, context, tp]
        names: tuple[str, ...] = ("dp", "context")
        if not self.replicate:
            names, ranks = ("weights",), ranks.flatten(0, 1)
        if ranks.shape[-1] > 1:
            # one mesh, as FSDP asks for where parameters are split twice
            both = spanned(kind, ranks, (*names, "tp"))
            return both[names], both["tp"]
        ranks = ranks.squeeze(-1)
        if self.replicate:
            return spanned(kind, ranks, names), None
        return DeviceMesh(kind, ranks, mesh_dim_names=names), None

    def _shard(self, module: nn.Module, over: DeviceMesh, reshard: bool) -> None:
        # on the CPU nothing can be pinned, nor need it be
        pinned = CPUOffloadPolicy(pin_memory=over.device_type != "cpu")
        fully_shard(
            module,
            mesh=over,
            reshard_after_forward=reshard,
            shard_placement_fn=partial(_apart, over.shape[-1]),
            mp_policy=self.precision,
            offload_policy=pinned if self.offload else OffloadPolicy(),
        )


def _resharded(objective: nn.Module, call: Callable[..., Any]) -> Callable[..., Any]:
    """The call, after which only shards are left: where no backward follows, nothing else frees weights."""

    def calling(*args: Any, **kwargs: Any) -> Any:
        try:
            return call(*args, **kwargs)
        finally:
            for module in objective.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()

    return calling


def _apart(ranks: int, p: nn.Parameter) -> Shard | None:
    """Along which dimension a parameter is sharded (None: the first). Torch cuts pieces that tensor
    parallelism has cut along it evenly only, and any others along the first only.
    """
    if not isinstance(p, DTensor) or not p.placements[0].is_shard(0):
        return None
    size = p.device_mesh.size()
    even = p.shape[0] % (size * ranks) == 0
    fits = [dim for dim in range(1, p.ndim) if p.shape[dim] % ranks == 0]
    if not even and not fits:
        raise ValueError(
            f"parallel.mesh.tp is {size}, and {ranks} ranks shard what each has of a weight {list(p.shape)}: "
            f"they can do so evenly only; take a model.dim that {ranks} divides, or other degrees of the mesh"
        )
    return None if even else Shard(fits[0])
