"""What the config files make, for tests of what knows no Hydra: they are skipped where there is none."""

from typing import Any

import pytest


def composed(*overrides: str) -> Any:
    """The config of a training job, checked as the command checks it."""
    hydra = pytest.importorskip("hydra")
    from longspan.train.config import typed

    with hydra.initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(hydra.compose("train", overrides=list(overrides)))


def made(node: Any) -> Any:
    """What a part of a config makes."""
    pytest.importorskip("hydra")
    from longspan.train import config

    return config.made(node)
