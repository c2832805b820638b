"""python -m longspan.train.convert from=runs/latest to=exported"""

import hashlib
import json
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import hydra
import torch
import yaml
from omegaconf import MISSING, DictConfig, OmegaConf

from ..kernels.mask import Causal, Window
from ..models.gpt import GPT
from ..models.lora import merged_weights
from .config import ConfigError, made, typed
from .entry import entry, guarded
from .huggingface.config import Settings, config_of
from .huggingface.folder import BESIDE, CONFIG, KINDS, Folder, Weight, name_of, shapes_of, write
from .job import Launch
from .trained import config_of as run_config
from .trained import load_weights

DTYPES = {str(kind).removeprefix("torch."): kind for kind in KINDS if kind is not torch.float64}
Say = Callable[[str], None]


@dataclass
class Conversion:
    """The root keys of conf/convert.yaml; `source` is its `from`, which Python keeps for itself."""

    source: str = MISSING
    to: str = MISSING
    dtype: str | None = None
    shard_gb: float = 5.0
    checkpoint: str = "auto"
    averaged: bool = False
    context: int | None = None


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="convert")
def _composed(cfg: DictConfig) -> None:
    launch = Launch.of(os.environ)
    sys.exit(guarded(lambda: convert(checked(cfg), print), launch))


def checked(cfg: DictConfig) -> DictConfig:
    """The composed config as a `Conversion`. ConfigError for what cannot be."""
    found = typed(named(cfg), Conversion)
    if found.dtype is not None and found.dtype not in DTYPES:
        raise ConfigError(f"dtype is {found.dtype!r}; it can be {', '.join(DTYPES)} or null")
    if found.shard_gb <= 0 or (found.context is not None and found.context < 1):
        raise ConfigError(
            f"shard_gb is {found.shard_gb}, context {found.context}; they need shard_gb > 0, context >= 1"
        )
    return found


def named(cfg: DictConfig) -> DictConfig:
    """The config with the names of `Conversion`."""
    for name in ("from", "to"):
        if OmegaConf.is_missing(cfg, name):
            raise ConfigError(f"{name} has no value: give one with {name}=...")
    return OmegaConf.create({"source" if name == "from" else name: cfg[name] for name in cfg})


def convert(cfg: DictConfig, say: Say) -> int:
    """Writes a folder of Hugging Face weights from another one, with the model that a run needs to start from
    it, or from a run.
    """
    source = Path(cfg.source)
    if (source / CONFIG).is_file():
        _from_folder(cfg, Folder(source), say)
    elif (source / "config.yaml").is_file():
        _from_run(cfg, source, say)
    else:
        raise FileNotFoundError(
            f"from={source} is neither a folder of Hugging Face weights ({CONFIG}) nor a run (config.yaml)"
        )
    return 0


def _from_folder(cfg: DictConfig, source: Folder, say: Say) -> None:
    settings = Settings.of_config(source.config, cfg.context)
    with torch.device("meta"):
        shapes = shapes_of(settings.model())
    source.check(shapes, tied=settings.tied)
    kinds = {name: DTYPES[cfg.dtype] if cfg.dtype else source.dtype(name) for name in shapes}
    weights = [
        Weight(name, shape, kinds[name], partial(source.tensor, name)) for name, shape in shapes.items()
    ]
    # the older key would stay beside the new one and say something else
    config = {key: value for key, value in source.config.items() if key not in ("dtype", "torch_dtype")}
    config["dtype"] = str(next(iter(kinds.values()))).removeprefix("torch.")
    model = f"model/{_choice(Path(cfg.to))}.yaml"
    texts = {model: yaml.safe_dump(settings.node(), sort_keys=False)}
    _write(cfg, config, weights, _beside(source.path), texts, say)
    say(f"start from it with: python -m longspan.train --config-dir {cfg.to} "
        f"model={_choice(Path(cfg.to))} init.path={cfg.to}")  # fmt: skip


def _from_run(cfg: DictConfig, run: Path, say: Say) -> None:
    facts = json.loads((run / "run.json").read_text())["data"]
    config = run_config(run)
    if "vocab" not in config.model or "vocab" not in facts:
        raise ValueError(f"from={run} trained no language model, so there is nothing to convert")
    model = made(config.model)(vocab=config.model.vocab or facts["vocab"], mask=made(config.mask))
    if config.lora is not None:
        made(config.lora).apply(model)
    step = load_weights(run, cfg.checkpoint, model, say, cfg=config, averaged=cfg.averaged)
    assert isinstance(model, GPT)
    if model.mix is not None:
        raise ValueError(f"from={run} has model.predecessor=true, which no model of transformers has")
    if sparse := [mask for mask in model.masks if not isinstance(mask, Causal | Window)]:
        say(
            f"note: trained under {sparse[0]}, which transformers does not know: each token will see all "
            f"before it"
        )
    base = Path(config.init.path) if config.init.path else None
    beside = _beside(base) if base is not None else {}
    beside |= _tokenizer(config.data.get("tokenizer"), facts.get("tokenizer"), say)
    dtype = cfg.dtype or "float32"
    weights = [
        Weight(name_of(own), tuple(x.shape), DTYPES[dtype], x.clone)
        for own, x in merged_weights(model).items()
    ]
    kept = Folder(base).config if base is not None and (base / CONFIG).is_file() else None
    said = config_of(Settings.of_model(model), context=facts["context"], dtype=dtype, base=kept)
    texts = {}
    if "tokenizer.json" in beside and "tokenizer_config.json" not in beside:
        texts["tokenizer_config.json"] = json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"})
    say(f"{run}, step {step}")
    _write(cfg, said, weights, beside, texts, say)


def _write(
    cfg: DictConfig, config: dict[str, Any], weights: list[Weight], beside: dict[str, Path],
    texts: dict[str, str], say: Say,
) -> None:  # fmt: skip
    files = write(Path(cfg.to), config, weights, shard_gb=cfg.shard_gb, beside=beside, texts=texts)
    count = sum(torch.Size(w.shape).numel() for w in weights)
    size = sum(w.bytes for w in weights) / 1e9
    others = ", ".join(sorted({*beside, *texts})) or "no tokenizer"
    say(f"{cfg.to}: {config['model_type']}, {count:,} parameters, {size:.2f} GB in {len(files)} "
        f"file{'s'[: len(files) > 1]}; {others}")  # fmt: skip


def _beside(folder: Path) -> dict[str, Path]:
    return {name: folder / name for name in BESIDE if (folder / name).is_file()}


def _tokenizer(setting: str | None, name: str | None, say: Say) -> dict[str, Path]:
    """The files of the tokenizer that a run used. ValueError if it is another one by now."""
    if not setting or not setting.endswith(".json"):
        return {}
    path = Path(setting).expanduser()
    if not path.is_file():
        say(f"note: data.tokenizer={setting} is gone, so that no tokenizer is written")
        return {}
    if name != f"{path.name} sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}":
        raise ValueError(f"data.tokenizer={setting} is not what the run was trained with: its hash differs")
    return _beside(path.parent) | {"tokenizer.json": path}


def _choice(folder: Path) -> str:
    """A name for the model as a choice of a config group."""
    return re.sub(r"\W+", "_", folder.resolve().name)


def main() -> None:
    """Composes the config and converts; exit codes are listed in `entry`."""
    entry(_composed, "convert", os.environ)


if __name__ == "__main__":
    main()
