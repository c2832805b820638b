"""A run that starts from Hugging Face weights."""

from pathlib import Path

from torch import nn

from ...models.gpt import GPT
from ..config import ConfigError, Init
from .config import Settings
from .folder import Folder


def start(model: nn.Module, init: Init, context: int) -> None:
    """Loads the weights of the folder that `init` names into the model, if it names one.

    context: tokens of a sequence, on which some RoPE scalings depend. ConfigError, with what to set, if the
    model computes something else than the folder's config.json says.
    """
    if init.path is None:
        if init.new_rope:
            raise ConfigError("init.new_rope is true, but init.path is null: there is no rope to differ from")
        return
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
    folder.load(model)
