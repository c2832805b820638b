"""DeepSpeed's ZeRO under every layout: gradients over dp x ring x head, checkpoints as of every engine."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..integrations import needs_extra
from ..rounding import Rounded
from ..singly import Singly
from .ddp import AXES
from .fsdp import FORWARDS
from .protocol import Build, May, Weights
from .states import load_state, saved_state, total_norm, update
from .zero_norm import asked
from .zero_pieces import Pieces
from .zero_settings import complete, read, settled

# They update each element by itself, so pieces of a flat vector do as well as whole tensors.
ELEMENTWISE = (torch.optim.AdamW, torch.optim.Adam, torch.optim.SGD)


class DeepSpeed:
    """stage: what ZeRO (Rajbhandari et al. 2020, section 5) splits over the ranks: 0 nothing, 1 optimizer
    state, 2 gradients too, 3 weights too; null takes config's, or 2.

    offload: optimizer state and float32 weights rest in CPU memory, where the step is made.
    offload_weights: with stage 3, the weights too. config: a JSON file of DeepSpeed's own, for all that is
    not said here; with an "optimizer" in it, that one is taken in the place of optim.optimizer. native:
    beside each checkpoint, in the run folder's native/, one of DeepSpeed's own, for its tools.
    """

    def __init__(
        self, *, stage: int | None = None, offload: bool = False, offload_weights: bool = False,
        config: str | None = None, native: bool = False,
    ) -> None:  # fmt: skip
        self.native = native
        self.config = read(Path(config)) if config is not None else {}
        self.zero = settled(self.config, stage=stage, offload=offload, offload_weights=offload_weights)
        self.stage = int(self.zero["stage"])

    def wrap(self, objective: nn.Module, build: Build, mesh: DeviceMesh) -> None:
        if mesh["tp"].size() > 1:
            raise ValueError(
                f"parallel.mesh.tp is {mesh['tp'].size()}; engine=deepspeed splits no layers, so it must be 1"
            )
        self._package = package(mesh.device_type)
        model: nn.Module = objective.model  # type: ignore[assignment]
        weights = mesh[AXES]._flatten("weights")
        self._ranks = weights.size()
        self._kind = mesh.device_type
        self._autocast = (False, torch.float32)
        self.objective, self.model = objective, model
        optimizer = build(model)
        self._refuse(optimizer)
        self._keep_autocast()
        own = "optimizer" in self.config
        self.engine, *_ = self._package.initialize(
            model=objective,
            optimizer=None if own else optimizer,
            model_parameters=_groups(optimizer) if own else None,
            config=complete(self.config, self.zero, parameters=sum(p.numel() for p in model.parameters())),
            mpu=_Ranks(weights, mesh["tp"]),
            dist_init_required=False,
        )
        self.optimizer: torch.optim.Optimizer = self.engine.basic_optimizer
        if self.stage:
            self.pieces = Pieces(model, self.engine.optimizer, self.stage, weights)
        if self.stage == 3:
            self._gather_outside_blocks()

    def backward(self, *inputs: Any, last: bool) -> Tensor:
        self._autocast = (
            torch.is_autocast_enabled(self._kind),
            torch.get_autocast_dtype(self._kind),
        )
        self.engine.set_gradient_accumulation_boundary(last)
        loss: Tensor = self.engine(*inputs)
        # DeepSpeed averages over the ranks, and each rank's loss is already its share of the global mean
        self.engine.backward(loss * self._ranks)
        return loss.detach()

    def step(self, lr: float, clip: float, may: May = math.isfinite) -> float:
        if not self.stage:
            norm = total_norm([p.grad for p in self.model.parameters() if p.grad is not None])
            update(self.optimizer, lr, norm, clip, may)
            return norm
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.optimizer.clip_grad = clip
        with asked(self.engine.optimizer, self.stage, may) as norms:
            self.engine.step()
        if not norms:
            # DeepSpeed found gradients that are not finite before it took their norm
            norms.append(math.inf)
            may(math.inf)
        return norms[0]

    def save(self) -> dict[str, Any]:
        return self.pieces.save() if self.stage else saved_state(self.model, self.optimizer)

    def load(self, state: dict[str, Any]) -> None:
        if self.stage:
            self.pieces.load(state)
        else:
            load_state(self.model, self.optimizer, state)

    def weights(self) -> Weights | None:
        return self.pieces if self.stage == 3 else None

    def save_native(self, folder: Path, step: int) -> None:
        """DeepSpeed's `save_checkpoint`: pickles, which its ds_to_universal and zero_to_fp32 read."""
        if not self.native:
            return
        from deepspeed.checkpoint import constants

        # without the version ds_to_universal refuses it
        version = {constants.UNIVERSAL_CHECKPOINT_VERSION_KEY: constants.UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        said = {"step": step, constants.UNIVERSAL_CHECKPOINT_INFO: version}
        self.engine.save_checkpoint(str(folder), tag=f"step-{step:08d}", client_state=said)

    def _refuse(self, optimizer: torch.optim.Optimizer) -> None:
        """What no piece, or no checkpoint, can be made of."""
        if isinstance(optimizer, Rounded):
            raise ValueError(
                "memory.weights is bfloat16, but engine=deepspeed keeps its own float32 weights: set it to "
                "float32, or take engine=fsdp or ddp"
            )
        if isinstance(optimizer, Singly):
            raise ValueError(
                "memory.optimizer is host; with engine=deepspeed set engine.offload=true instead"
            )
        if own := self.config.get("optimizer"):
            if own.get("type") not in ("Adam", "AdamW"):
                raise ValueError(
                    f"engine.config says optimizer.type is {own.get('type')!r}; it can be Adam or AdamW"
                )
            if not self.stage and not own.get("params", {}).get("torch_adam"):
                raise ValueError("engine.stage is 0, so engine.config's optimizer must say torch_adam: true")
        elif self.stage and not isinstance(optimizer, ELEMENTWISE):
            names = ", ".join(kind.__name__ for kind in ELEMENTWISE)
            raise ValueError(
                f"optim.optimizer is {type(optimizer).__name__}, which needs whole tensors, but engine.stage="
                f"{self.stage} updates flat pieces of them: take engine.stage=0, or one of {names}"
            )

    def _keep_autocast(self) -> None:
        """DeepSpeed turns off the autocast that it is called under; the objective turns it on again."""
        forward = self.objective.forward

        def forwarding(*inputs: Any) -> Any:
            enabled, dtype = self._autocast
            with torch.autocast(self._kind, dtype=dtype, enabled=enabled):
                return forward(*inputs)

        self.objective.forward = forwarding

    def _gather_outside_blocks(self) -> None:
        """What is outside the blocks is used by the objective too, at both ends of its forward; and what it
        computes besides its forward is computed as a forward, in which blocks are gathered in turn.
        """
        inside = {p for block in self.model.blocks for p in block.parameters()}  # type: ignore[union-attr]
        for p in self.model.parameters():
            if p not in inside:
                self._package.zero.register_external_parameter(self.objective, p)
        forward = self.objective.forward
        asked: list[Callable[..., Any]] = []

        def forwarding(*args: Any, **kwargs: Any) -> Any:
            return (asked.pop() if asked else forward)(*args, **kwargs)

        def through(method: Callable[..., Any]) -> Callable[..., Any]:
            def calling(*args: Any, **kwargs: Any) -> Any:
                asked.append(method)
                return self.objective(*args, **kwargs)

            return calling

        self.objective.forward = forwarding
        for name in FORWARDS:
            if hasattr(self.objective, name):
                setattr(self.objective, name, through(getattr(self.objective, name)))


class _Ranks:
    """The groups that DeepSpeed asks for, taken from our mesh: it makes none, so none can be wrong."""

    def __init__(self, weights: DeviceMesh, layers: DeviceMesh) -> None:
        self.weights, self.layers = weights, layers

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        return self.weights.get_group()

    def get_data_parallel_group_ranks(self) -> list[int]:
        return dist.get_process_group_ranks(self.weights.get_group())

    def get_data_parallel_world_size(self) -> int:
        return int(self.weights.size())

    def get_data_parallel_rank(self) -> int:
        return int(self.weights.get_local_rank())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        return self.layers.get_group()

    def get_model_parallel_world_size(self) -> int:
        return int(self.layers.size())

    def get_model_parallel_rank(self) -> int:
        return int(self.layers.get_local_rank())

    # DeepSpeed asks under both names
    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def package(kind: str) -> Any:
    """DeepSpeed, ready for this kind of device."""
    try:
        import deepspeed
        import deepspeed.accelerator
        import deepspeed.comm
        import deepspeed.ops
    except ModuleNotFoundError as error:
        raise needs_extra("engine=deepspeed", "deepspeed", error) from error
    works = deepspeed.accelerator.get_accelerator().device_name()
    if works != kind:
        raise ValueError(f"device is {kind}, but DeepSpeed works on {works} here: set DS_ACCELERATOR={kind}")
    # an operator for the CPU that is compiled for a minute, for collectives that gloo does as well
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed(
        dist.get_backend(), auto_mpi_discovery=False, verbose=False, dist_init_required=None
    )
    return deepspeed


def _groups(optimizer: torch.optim.Optimizer) -> list[dict[str, Any]]:
    """The parameters as our optimizer has them, for one of DeepSpeed's."""
    names = ("params", "lr", "weight_decay")
    return [{name: group[name] for name in names} for group in optimizer.param_groups]
