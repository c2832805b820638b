"""Megatron's own sum of gradients and its distributed optimizer, in the place of ours and optim's."""

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard

from ..agree import highest
from .ddp import AXES
from .megatron_parts import Names, Part
from .protocol import May
from .zero_pieces import assembled, shared

MOMENTS = ("exp_avg", "exp_avg_sq")
# Of AdamW's settings those that Megatron is told; the others must be what they are by default.
TOLD = ("params", "lr", "betas", "eps", "weight_decay")


class Distributed:
    """Gradients and AdamW in Megatron's flat buffers: a reduce-scatter adds gradients up over dp x context,
    each rank updates its stretch of the numbers and keeps the moments of that alone, and all gather the
    weights (ZeRO stage 1: Rajbhandari et al. 2020, section 5.1).

    Args:
        model: Of Megatron's layers; its parameters move into the buffers.
        made: The GPTModel that they are of.
        optimizer: Whose settings, and groups with their weight decay, Megatron's optimizer gets.
        cut: Parameters of which tensor-parallel ranks hold parts.

    Raises:
        ValueError: The optimizer is not what Megatron's can be.
    """

    def __init__(
        self, model: nn.Module, made: Any, optimizer: torch.optim.Optimizer, names: Names, mesh: DeviceMesh,
        cut: set[nn.Parameter],
    ) -> None:  # fmt: skip
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import get_megatron_optimizer

        config, overrides = settings(optimizer)
        self.model, self.names = model, names
        self.weights = mesh[AXES]._flatten("weights")
        self.both = _both(mesh, self.weights)
        for p in model.parameters():
            # the norm counts what ranks hold alike once
            p.tensor_model_parallel = p in cut  # type: ignore[attr-defined]
        said = DistributedDataParallelConfig(use_distributed_optimizer=True, grad_reduce_in_fp32=True)
        self.ddp = DistributedDataParallel(made.config, said, model)
        (self.zero,) = get_megatron_optimizer(config, [self.ddp], overrides).chained_optimizers
        for group in self.zero.param_groups:
            # as Megatron's scheduler does, which has no part here
            group["weight_decay"] = config.weight_decay * group["wd_mult"]

    def step(self, lr: float, clip: float, may: May = math.isfinite) -> float:
        """One update, as the protocol of engines has it."""
        with warnings.catch_warnings():
            # Megatron keeps gradients of stretches of parameters, which are no leaves
            warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf")
            return self._step(lr, clip, may)

    def _step(self, lr: float, clip: float, may: May) -> float:
        from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32

        self.zero.prepare_grads()
        norm = float(self.zero.get_grad_norm())
        for group in self.zero.param_groups:
            group["lr"] = lr
        if may(norm):
            if clip and norm > clip:
                clip_grad_by_total_norm_fp32(self.zero.get_parameters(), clip, norm)
            self.zero.step_with_ready_grads()
        self.zero.zero_grad()
        self.ddp.zero_grad_buffer()
        return norm

    def state(self) -> dict[str, dict[str, Tensor]]:
        """Moments and counts of steps by the names of checkpoints. One parameter at a time is put together,
        and of each a rank keeps its rows.
        """
        steps = torch.tensor(float(self.steps()))
        found: dict[str, dict[str, Tensor]] = {}
        for name, p in self.model.named_parameters():
            shard, first = self._shard(p)
            kept = {} if shard is None else self.zero.optimizer.state.get(shard, {})
            for key in MOMENTS:
                whole = assembled(torch.zeros_like(p), kept.get(key), first, self.weights)
                for part in self.names.parts(name, whole):
                    found.setdefault(part.name, {"step": steps.clone()})[key] = self._rows(part)
        return found

    @torch.no_grad()
    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Takes back what `state` gave; the weights are in place."""
        self.zero.reload_model_params()
        inner, steps = self.zero.optimizer, next(iter(state.values()))["step"]
        # torch's keeps a count for each parameter, the fused ones one for each group
        each = isinstance(inner, torch.optim.AdamW)
        for group in () if each else inner.param_groups:
            group["step"] = int(steps)
        for name, p in self.model.named_parameters():
            shard, first = self._shard(p)
            found = {"step": steps.clone()} if each else {}
            for key in MOMENTS:
                whole = torch.zeros_like(p)
                self.names.fill({name: whole}, {n: kept[key] for n, kept in state.items()})
                if shard is not None:
                    found[key] = whole.view(-1)[first : first + shard.numel()].clone()
            if shard is not None:
                inner.state[shard] = found

    def steps(self) -> int:
        """Updates that were made; the same on all ranks, also where one holds nothing but padding."""
        inner = self.zero.optimizer
        counts = [*inner.state.values(), *inner.param_groups]
        made = max((int(kept["step"]) for kept in counts if "step" in kept), default=0)
        return highest(made, self.weights.get_group())

    def _shard(self, p: nn.Parameter) -> tuple[Tensor | None, int]:
        """The stretch of a parameter that this rank updates, and its first element; None: it has none."""
        if p not in self.zero.model_param_gbuf_map:
            return None, 0
        group, order = self.zero.model_param_group_index_map[p]
        shard: Tensor = self.zero.optimizer.param_groups[group]["params"][order]
        return shard, self.zero._get_model_param_range_map(p)["param"].start

    def _rows(self, part: Part) -> DTensor:
        """This rank's rows of what the ranks that share weights, or layers and weights, have together."""
        rows = shared(part.view.reshape(part.shape), self.weights)
        if self.both is None:
            return rows
        shape = torch.Size(self.names.size(part) if i == part.dim else n for i, n in enumerate(part.shape))
        layers = Replicate() if part.dim is None else Shard(part.dim)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            rows.to_local(), self.both, [layers, Shard(0)], run_check=False, shape=shape, stride=stride
        )


def _both(mesh: DeviceMesh, weights: DeviceMesh) -> DeviceMesh | None:
    """tp before what shares weights, of the groups that there are; None without tp."""
    tp = mesh["tp"]
    if tp.size() == 1:
        return None
    ranks = mesh.mesh.reshape(-1, tp.size()).T.contiguous()
    groups = [tp.get_group(), weights.get_group()]
    return DeviceMesh.from_group(groups, mesh.device_type, ranks, mesh_dim_names=("tp", "weights"))


def needs_cuda(kind: str) -> None:
    """ValueError for a kind of device that Megatron's buffers and optimizer do not know."""
    if kind != "cuda":
        raise ValueError(
            f"engine.optimizer is distributed, and device {kind}: megatron-core's works on cuda alone; set "
            "engine.optimizer=ours"
        )


def settings(optimizer: torch.optim.Optimizer) -> tuple[Any, dict[Any, Any]]:
    """Megatron's OptimizerConfig, and what differs by group, of an optimizer that was built over the model.

    Raises:
        ValueError: It is not a plain AdamW.
    """
    _refuse(optimizer)
    from megatron.core.optimizer import OptimizerConfig, ParamKey
    from megatron.core.optimizer.optimizer_config import ParamPredicate

    groups = optimizer.param_groups
    most = max(group["weight_decay"] for group in groups)
    config = OptimizerConfig(
        optimizer="adam", lr=groups[0]["lr"], weight_decay=most, adam_beta1=groups[0]["betas"][0],
        adam_beta2=groups[0]["betas"][1], adam_eps=groups[0]["eps"], use_distributed_optimizer=True,
        clip_grad=0.0,
    )  # fmt: skip
    overrides = {}
    for number, group in enumerate(groups):
        inside = {id(p) for p in group["params"]}
        key = ParamKey(predicate=ParamPredicate(f"group {number}", lambda p, s=inside: id(p) in s))
        overrides[key] = {"wd_mult": group["weight_decay"] / most if most else 1.0}
    return config, overrides


def _refuse(optimizer: torch.optim.Optimizer) -> None:
    if type(optimizer) is not torch.optim.AdamW:
        raise ValueError(
            f"engine.optimizer is distributed, which is AdamW, and the job's is {type(optimizer).__name__}: "
            "set optim.optimizer to torch.optim.AdamW, memory.optimizer=device, or engine.optimizer=ours"
        )
    plain = torch.optim.AdamW([nn.Parameter(torch.empty(0))]).defaults
    for group in optimizer.param_groups:
        for name, value in group.items():
            if name not in TOLD and value != plain.get(name, value):
                raise ValueError(
                    f"optim.optimizer.{name} is {value}; with engine.optimizer=distributed it must be "
                    f"{plain[name]}, or set engine.optimizer=ours"
                )
