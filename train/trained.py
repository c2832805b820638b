"""A finished run opened again: its own config, and the weights of one of its checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, set_model_state_dict

from .checkpoint import Checkpoints
from .config import ConfigError, typed

FSDP = "longspan.train.engine.fsdp.FSDP"
INSTEAD = ("longspan.train.engine.deepspeed.DeepSpeed", "longspan.train.engine.megatron.Megatron")


def config_of(folder: Path, **groups: DictConfig) -> DictConfig:
    """The config that the run in `folder` was started with, with some groups replaced. OSError if it is no
    run.
    """
    path = folder / "config.yaml"
    if not path.is_file():
        raise FileNotFoundError(
            f"run.dir={folder} holds no config.yaml; give the folder of a run, such as runs/latest"
        )
    try:
        kept = OmegaConf.load(path)
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is no config: {' '.join(str(error).split())}") from None
    if not isinstance(kept, DictConfig):
        raise ConfigError(f"{path} is no config: it holds a {type(kept).__name__}")
    if OmegaConf.select(kept, "engine._target_") in INSTEAD:
        # without a step to make, FSDP shards weights as well, and a checkpoint is read into its shards
        kept.engine = {"_target_": FSDP}
    if OmegaConf.select(kept, "memory.float8"):
        # weights are plain ones, which any device can evaluate
        kept.memory.float8 = False
    for name, group in groups.items():
        kept[name] = group
    return typed(kept)


def load_weights(
    folder: Path, which: str, model: nn.Module, warn: Callable[[str], None], *, cfg: DictConfig,
    averaged: bool = False,
) -> int:  # fmt: skip
    """Loads the model's weights, or their average, from checkpoint `which` (auto or a path) of the run in
    `folder` with config `cfg`; the step it was saved at. The model's weights keep their dtype.
    """
    first = {id(p): name for name, p in model.named_parameters()}
    # a weight that is shared has more names in a checkpoint, but none of them in an average
    names = {name: first[id(p)] for name, p in model.named_parameters(remove_duplicate=False)}
    kept = getattr(torch, OmegaConf.select(cfg, "memory.weights", default="float32"))
    if averaged:
        kept = torch.float32
    own: dict[str, Any] = get_model_state_dict(model)
    for name, one in names.items():
        # read in the dtype that it was written in
        x = own[one]
        own[name] = x.to(kept) if x.dtype in (torch.float32, torch.bfloat16) else x
    weights = {name: own[name] for name in first.values()}
    tensors: dict[str, Any] = {"model": own}
    if averaged:
        tensors = {"ema": {"weights": weights, "updates": torch.tensor(0)}}
    found = Checkpoints(folder / "checkpoints", asynchronous=False, warn=warn).load(which, tensors)
    if found is None:
        raise FileNotFoundError(f"run.dir={folder} holds no checkpoint yet")
    set_model_state_dict(model, own)
    return int(found["step"])
