"""megatron-core under every layout: its layers and tensor parallelism, its process groups over our mesh."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...models.gpt import GPT
from ..integrations import needs_extra, sum_gradients
from ..singly import Singly
from .ddp import AXES
from .megatron_distributed import Distributed, needs_cuda
from .megatron_native import write
from .megatron_parts import parts_of
from .protocol import Build, May, Weights
from .states import load_state, saved_state, total_norm, update
from .tensor_parallel import check


class Megatron:
    """The layers of a GPT are those of megatron-core's GPTModel, held together by the ranks of the axis tp
    (Shoeybi et al. 2019, section 3); attention is the job's layout. Gradients are summed over dp x ring x
    head.

    optimizer: `ours` is optim's, and every rank holds the state of all that it has of the weights;
    `distributed` is Megatron's AdamW, with optim's settings, of which each rank holds a part. native: beside
    each checkpoint, in the run folder's native/, one of Megatron's own, which needs its optimizer.
    """

    def __init__(self, *, optimizer: Literal["ours", "distributed"] = "ours", native: bool = False) -> None:
        if optimizer not in ("ours", "distributed"):
            raise ValueError(f"engine.optimizer is {optimizer!r}; it can be ours or distributed")
        if native and optimizer == "ours":
            raise ValueError("engine.native is true; it needs engine.optimizer=distributed, not ours")
        self.distributed, self.native = optimizer == "distributed", native

    def wrap(self, objective: nn.Module, build: Build, mesh: DeviceMesh) -> None:
        model, tp = objective.model, mesh["tp"]
        if not isinstance(model, GPT):
            raise ValueError(
                f"engine=megatron serves models of text, not {type(model).__name__}: take engine=fsdp"
            )
        refuse(model, tp.size(), native=self.native)
        if self.distributed:
            needs_cuda(mesh.device_type)
        context = mesh["ring"].size() * mesh["head"].size()
        initialize(mesh, context)
        self.names, table, layers, head, self.made = parts_of(model, tp, context)
        weights, tied = dict(model.state_dict()), self.names.tied
        model.embed, model.blocks, model.head = table, nn.ModuleList(layers), head  # type: ignore[assignment]
        model.to(device=weights["embed.weight"].device)
        self.model, self.objective, self.tp = model, objective, tp
        self.cut: set[nn.Parameter] = set()
        if tp.size() > 1:
            # each rank has the loss of its part of the vocabulary, and so an addend of this gradient
            model.norm.register_forward_hook(lambda _, args, x: _whole_gradient(x))
        self.names.fill(dict(model.named_parameters()), weights)
        for name, p in model.named_parameters():
            parts = [*self.names.parts(name, p.detach())]
            own = {part.name for part in parts} - {"head.weight" if tied else ""}
            p.whole_numel = sum(weights[part].numel() for part in own)  # type: ignore[attr-defined]
            if parts[0].dim is not None:
                self.cut.add(p)
        self.group = mesh[AXES]._flatten("weights").get_group() if dist.get_world_size() > 1 else None
        self.optimizer = build(model)
        self.own: Distributed | None = None
        if self.distributed:
            self.own = Distributed(model, self.made, self.optimizer, self.names, mesh, self.cut)
            return
        if isinstance(self.optimizer, Singly) and tp.size() > 1:
            raise ValueError(
                f"memory.optimizer is host, and parallel.mesh.tp {tp.size()}; engine=megatron takes one of "
                "them: set memory.optimizer=device or parallel.mesh.tp=1"
            )

    def backward(self, *inputs: Any, last: bool) -> Tensor:
        with nullcontext() if self.own is None or last else self.own.ddp.no_sync():
            loss: Tensor = self.objective(*inputs)
            loss.backward()
        if last and self.own is not None:
            # while a rank has whole gradients
            self._sum_of_heads("main_grad")
            self.own.ddp.finish_grad_sync()
        elif last:
            sum_gradients(self.model, self.group)
            self._sum_of_heads("grad")
        # ranks that share layers have the same loss
        return loss.detach() / self.tp.size()

    def step(self, lr: float, clip: float, may: May = math.isfinite) -> float:
        if self.own is not None:
            return self.own.step(lr, clip, may)
        norm = total_norm([self._grad(p) for p in self.model.parameters() if p.grad is not None])
        update(self.optimizer, lr, norm, clip, may)
        return norm

    def save(self) -> dict[str, Any]:
        raw = saved_state(self.model, self.optimizer) if self.own is None else {"model": self.held()}
        model = {
            part.name: self.names.whole(part)
            for name, x in raw["model"].items()
            if x is not None
            for part in self.names.parts(name, x)
        }
        optim = self._state(raw) if self.own is None else self.own.state()
        if self.names.tied:
            # one parameter, which the optimizer knows by its first name
            optim.pop("head.weight", None)
        return {"model": model, "optim": optim}

    def _state(self, raw: dict[str, Any]) -> dict[str, dict[str, Tensor]]:
        """The state of our optimizer by the names of checkpoints."""
        optim: dict[str, dict[str, Tensor]] = {}
        for name, state in raw["optim"].items():
            like = raw["model"][name]
            for key, x in state.items():
                # a count of steps is no tensor like the weight, and the same for all its parts
                for part in self.names.parts(name, x if x.shape == like.shape else like):
                    whole = self.names.whole(part) if x.shape == like.shape else x.clone()
                    optim.setdefault(part.name, {})[key] = whole
        return optim

    def save_native(self, folder: Path, step: int) -> None:
        """Megatron's dist_checkpointing; among what it writes are pickles."""
        if not self.native:
            return
        assert self.own is not None
        if not self.own.steps():
            raise ValueError("no update was made yet, and Megatron's optimizer has no state to write")
        write(self.made, self.own.zero, folder, step)

    def weights(self) -> Weights | None:
        return self

    def held(self) -> dict[str, Tensor]:
        """The parameters by Megatron's names."""
        return dict(self.model.named_parameters())

    def named(self, like: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """By the names of checkpoints, of tensors like the parameters."""
        parts = [part for name, x in like.items() for part in self.names.parts(name, x)]
        skipped = "head.weight" if self.names.tied else ""
        return {part.name: self.names.whole(part) for part in parts if part.name != skipped}

    def take(self, like: Mapping[str, Tensor], named: Mapping[str, Tensor]) -> None:
        """Fills tensors that are like the parameters."""
        self.names.fill(dict(like), dict(named))

    def changed(self) -> None:
        """Nothing else holds weights."""

    def load(self, state: dict[str, Any]) -> None:
        if self.own is not None:
            self.names.fill(self.held(), state["model"])
            self.own.load(state["optim"])
            return
        raw = saved_state(self.model, self.optimizer)
        self.names.fill(raw["model"], state["model"])
        for name, found in raw["optim"].items():
            like = raw["model"][name]
            for key, x in found.items():
                if x.shape == like.shape:
                    self.names.fill({name: x}, {n: s[key] for n, s in state["optim"].items() if key in s})
                else:
                    first = next(iter(self.names.parts(name, like))).name
                    x.copy_(state["optim"][first][key])
        load_state(self.model, self.optimizer, raw)

    def _sum_of_heads(self, grad: str) -> None:
        """Norms of single heads have a gradient, an attribute of that name, from the heads of each rank."""
        if self.tp.size() == 1:
            return
        for name, p in self.model.named_parameters():
            x: Tensor | None = getattr(p, grad, None)
            if ("q_layernorm" in name or "k_layernorm" in name) and x is not None:
                dist.all_reduce(x, group=self.tp.get_group())

    def _grad(self, p: nn.Parameter) -> Tensor:
        """A gradient, as a DTensor where tensor-parallel ranks hold parts of it."""
        assert p.grad is not None
        parts = self.tp.size() > 1 and p in self.cut
        return DTensor.from_local(p.grad, self.tp, [Shard(0)], run_check=False) if parts else p.grad


def _whole_gradient(x: Tensor) -> Tensor:
    from megatron.core.tensor_parallel import copy_to_tensor_model_parallel_region

    same: Tensor = copy_to_tensor_model_parallel_region(x)
    return same


def refuse(model: GPT, tp: int, *, native: bool = False) -> None:
    """ValueError for what megatron-core's layers, or its own checkpoints (native), cannot be."""
    check(model, tp)
    if native and model.mix is not None:
        raise ValueError(
            "engine.native is true, and model.predecessor, which Megatron's GPTModel does not know: set "
            "one of them to false"
        )
    if model.embed.weight.dtype != torch.float32:
        raise ValueError(
            "memory.weights is bfloat16; with engine=megatron it must be float32: take engine=fsdp"
        )
    if model.bias == "qkvo":
        raise ValueError("model.bias is qkvo; with engine=megatron it can be none or qkv: take engine=fsdp")
    changed = [name for name, module in model.named_modules() if "forward" in vars(module)]
    if changed:
        raise ValueError(
            f"memory changes {changed[0]}, which engine=megatron replaces: set memory=none, or take "
            "engine=fsdp"
        )


def initialize(mesh: DeviceMesh, context: int) -> None:
    """Megatron's process groups, which are those of the mesh: tp within context within dp."""
    try:
        from megatron.core import parallel_state
    except ImportError as error:
        raise needs_extra("engine=megatron", "megatron", error) from error
    order = mesh.mesh.flatten().tolist()
    if order != list(range(len(order))):
        raise ValueError(
            f"engine=megatron numbers ranks in the order of the mesh, but parallel.mesh has {order}"
        )
    # of another job of this process, whose groups have ended
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=mesh["tp"].size(), context_parallel_size=context
    )
