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

DEEPSPEED, FSDP = "longspan.train.engine.deepspeed.DeepSpeed", "longspan.train.engine.fsdp.FSDP"


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
    if OmegaConf.select(kept, "engine._target_") == DEEPSPEED:
        # without a step to make, FSDP shards weights as well, and a checkpoint is read into its shards
        kept.engine = {"_target_": FSDP}
    for name, group in groups.items():
        kept[name] = group
    return typed(kept)


def load_weights(
    folder: Path, which: str, model: nn.Module, warn: Callable[[str], None], *, averaged: bool = False
) -> int:
    """Loads the model's weights, or their average, from checkpoint `which` (auto or a path) of the run in
    `folder`; the step it was saved at.
    """
    own = get_model_state_dict(model)
    names = {name for name, _ in model.named_parameters()}
    weights = {name: x for name, x in own.items() if name in names}
    tensors: dict[str, Any] = {"model": own}
    if averaged:
        tensors = {"ema": {"weights": weights, "updates": torch.tensor(0)}}
    found = Checkpoints(folder / "checkpoints", asynchronous=False, warn=warn).load(which, tensors)
    if found is None:
        raise FileNotFoundError(f"run.dir={folder} holds no checkpoint yet")
    set_model_state_dict(model, own)
    return int(found["step"])
