"""python -m longspan.train.tokenize data.path=my/texts data.tokenizer=tokenizer.json out=my/corpus"""

import os
import sys
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import hydra
from omegaconf import DictConfig

from .config import Run, made, typed
from .data.indexed import write
from .data.packed import Packed
from .entry import entry, guarded
from .job import Launch


@dataclass
class Tokenizing:
    """The root keys of conf/tokenize.yaml."""

    run: Run = field(default_factory=Run)
    seed: int = 0
    out: str = ""
    data: Any = None


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="tokenize")
def _composed(cfg: DictConfig) -> None:
    launch = Launch.of(os.environ)
    sys.exit(guarded(lambda: tokenize(typed(cfg, Tokenizing), launch), launch))


def tokenize(cfg: DictConfig, launch: Launch) -> int:
    """Writes the token ids of all documents, training and held-out, in Megatron's format."""
    if launch.world > 1:
        raise ValueError(f"this writes one pair of files: start one process, not {launch.world}")
    data = made(cfg.data)
    if not isinstance(data, Packed):
        raise ValueError(f"data is {type(data).__name__}: take data=text, or data=stdlib")
    documents, tokens = write(
        os.path.expanduser(cfg.out), chain(data.documents(), data.held_out().documents()), data.vocab
    )
    size = f"data.tokenizer={cfg.data.get('tokenizer', 'bytes')}"
    print(f"{documents} documents, {tokens} tokens: train with data=indexed data.path={cfg.out} {size}")
    return 0


def main() -> None:
    """Composes the config and writes; exit codes are listed in `entry`."""
    entry(_composed, "tokenize", os.environ)


if __name__ == "__main__":
    main()
