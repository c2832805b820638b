"""A run that starts from Hugging Face weights."""

from pathlib import Path

import torch
from torch import nn

from ...models.gpt import GPT
from ...models.lora import LoraLinear
from ..agree import Ranks
from ..config import ConfigError, Init
from ..engine.protocol import Build
from ..engine.states import local
from .config import Settings
from .folder import Folder, box_of


def start(model: nn.Module, init: Init, context: int, seed: int = 0) -> Folder | None:
    """Loads the weights of the folder that `init` names into the model, if it names one; a model without
    storage is only checked (`later` loads then). The folder.

    context: tokens of a sequence, on which some RoPE scalings depend. seed: of LoRA's part. ConfigError, with
    what to set, if the model computes something else than the folder's config.json says.
    """
    if init.path is None:
        if init.new_rope:
            raise ConfigError("init.new_rope is true, but init.path is null: there is no rope to differ from")
        return None
    where = f"init.path={init.path}"
    if not isinstance(model, GPT):
        raise ConfigError(f"{where} holds a decoder of text; {type(model).__name__} is none: take model=gpt")
    if model.mix is not None:
        raise ConfigError(f"{where} holds no predecessor mix: set model.predecessor=false")
    folder = Folder(Path(init.path))
    own, theirs = Settings.of_model(model), Settings.of_config(folder.config, context)
    if wrong := own.differences(theirs, where):
        raise ConfigError(f"{'; '.join(wrong)}: python -m longspan.train.convert writes a model that fits")
    if own.rope != theirs.rope and not init.new_rope:
        raise ConfigError(
            f"model.rope is {own.rope}, but {where} has {theirs.rope}: set model.rope.* alike, or "
            f"init.new_rope=true to stretch it on purpose"
        )
    if not any(p.is_meta for p in model.parameters()):
        folder.load(model)
        adapt(model, seed)
    return folder


@torch.no_grad()
def adapt(model: nn.Module, seed: int) -> None:
    """Gives LoRA's differences their first values, the same ones whatever part of them a rank holds."""
    layers = [module for module in model.modules() if isinstance(module, LoraLinear)]
    for number, layer in enumerate(layers):
        draw = torch.Generator().manual_seed(hash((seed, number)) & (2**63 - 1))
        whole = layer.drawn(torch.empty(layer.a.shape), draw)
        local(layer.a).copy_(whole[box_of(layer.a)])
        local(layer.b).zero_()


def later(
    build: Build, folder: Folder, objective: nn.Module, ranks: Ranks, device: torch.device, seed: int
) -> Build:
    """What `build` would build, of a model without storage: once the engine has sharded it, each rank makes
    room on `device` for what it holds, and reads that. seed: of LoRA's part.
    """

    def building(model: nn.Module) -> torch.optim.Optimizer:
        assert isinstance(model, GPT)
        objective.to_empty(device=device)
        ranks.together(lambda: folder.load(model))
        adapt(model, seed)
        return build(model)

    return building
