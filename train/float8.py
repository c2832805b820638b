"""Linear layers of a model's blocks that multiply in float8, by torchao, on hardware that can."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..models.adaln import Modulation
from ..models.memory import Recipe
from .engine.ddp import DDP
from .engine.fsdp import FSDP
from .engine.protocol import Engine

# Ada, Hopper and newer
CAPABLE = (8, 9)
# what tensor cores multiply in float8 has sizes that this divides
MULTIPLE = 16


def check(cfg: DictConfig, engine: Engine, mesh: DeviceMesh, device: torch.device) -> None:
    """ValueError, saying what would work, if this job cannot multiply in float8."""
    said = f"memory.float8 is {cfg.memory.float8}"
    if not isinstance(engine, DDP | FSDP):
        raise ValueError(f"{said}; {type(engine).__name__} runs layers of its own: take engine=ddp or fsdp")
    if mesh["tp"].size() > 1:
        raise ValueError(
            f"{said}; parallel.mesh.tp={mesh['tp'].size()} splits plain layers: set parallel.mesh.tp=1"
        )
    if cfg.lora is not None and cfg.lora.rank:
        raise ValueError(f"{said}; lora.rank={cfg.lora.rank} adds to plain layers: set lora.rank=0")
    if cfg.train.precision != "bfloat16":
        raise ValueError(
            f"{said}; its results are bfloat16, and train.precision is {cfg.train.precision}: "
            "set train.precision=bfloat16"
        )
    here = "device is cpu"
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        if capability >= CAPABLE:
            return
        here = f"{torch.cuda.get_device_name(device)} has {'.'.join(map(str, capability))}"
    raise ValueError(
        f"{said}; it needs a GPU of compute capability {'.'.join(map(str, CAPABLE))} or newer, and {here}: "
        "set memory.float8=false"
    )


def convert(model: nn.Module, recipe: bool | Recipe, *, emulate: bool = False) -> None:
    """Lets the linear layers in `model.blocks` multiply in float8, all but those that make adaLN's shifts
    and scales (Micikevicius et al. 2022; recipes are torchao's). Weights, and their names, stay as they are.

    emulate: multiply rounded numbers in the plain way, which any device can.
    ValueError if a layer has sizes that cannot be; ModuleNotFoundError without torchao.
    """
    try:
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training
    except ModuleNotFoundError as error:
        message = f"memory.float8={recipe} needs torchao: pip install longspan[float8]"
        raise ModuleNotFoundError(message) from error
    plain = Float8LinearConfig.from_recipe_name("tensorwise" if recipe is True else recipe)
    # the tokens that a rank holds need not be a multiple of 16
    config = replace(plain, emulate=emulate, pad_inner_dim=True)
    blocks = cast(nn.ModuleList, model.blocks)
    left = {id(m) for x in blocks.modules() if isinstance(x, Modulation) for m in x.modules()}

    def wanted(module: nn.Module, name: str) -> bool:
        return type(module) is nn.Linear and id(module) not in left

    chosen = [name for name, module in blocks.named_modules() if wanted(module, name)]
    for name in chosen:
        shape = blocks.get_parameter(f"{name}.weight").shape
        if any(size % MULTIPLE for size in shape):
            raise ValueError(
                f"memory.float8 is {recipe}; blocks.{name}.weight is {list(shape)}, and {MULTIPLE} must "
                "divide both: set memory.float8=false, or a model of such sizes"
            )
    convert_to_float8_training(blocks, config=config, module_filter_fn=wanted)
    for name in chosen:
        layer = blocks.get_submodule(name)
        layer.forward = _of_some(layer)


def _of_some(layer: Any) -> Callable[[Tensor], Tensor]:
    """The layer's forward, also of no token, whose greatest number is not known."""
    scaled = layer.forward

    def forward(x: Tensor) -> Tensor:
        y: Tensor = scaled(x) if x.numel() else F.linear(x, layer.weight, layer.bias)
        return y

    return forward
