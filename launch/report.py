"""python -m longspan.launch.report run=runs/latest: a run as one HTML file; run=[runs/a,runs/b] lays two
beside each other.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
from omegaconf import MISSING, DictConfig, ListConfig

from ..train.config import ConfigError, typed
from ..train.entry import entry, guarded
from ..train.job import Launch
from ..train.report.page import write
from ..train.timeline import ALL, merge
from ..train.trace import FOLDER


@dataclass
class Reporting:
    """The root keys of conf/report.yaml. run: the folder of a run, or a list of up to four. out: the file;
    null: report.html or compared.html in the (first) run's folder.
    """

    run: Any = MISSING
    out: str | None = None


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="report")
def _composed(cfg: DictConfig) -> None:
    sys.exit(guarded(lambda: report(typed(cfg, Reporting)), Launch()))


def report(cfg: DictConfig) -> int:
    """Merges what traces the runs have, writes the page and says where it is."""
    given = list(cfg.run) if isinstance(cfg.run, ListConfig) else [cfg.run]
    if not 1 <= len(given) <= 4 or not all(isinstance(name, str) for name in given):
        raise ConfigError(f"run is {given}; it must be the folder of a run, or a list of two to four")
    folders = [Path(name) for name in given]
    for line in merged(folders):
        print(line)
    print(write(folders, None if cfg.out is None else Path(cfg.out)))
    return 0


def merged(folders: Sequence[Path]) -> list[str]:
    """Merges the ranks' traces of these runs where that has not been done since they were written: a line for
    each, and for each file that is no trace.
    """
    lines = []
    for folder in (folder / FOLDER for folder in folders):
        parts, whole = list(folder.glob("rank*.json.gz")), folder / ALL
        newest = max((part.stat().st_mtime for part in parts), default=0.0)
        if parts and not (whole.exists() and whole.stat().st_mtime >= newest):
            try:
                found = merge(folder)
            except ValueError as error:
                lines.append(f"ranks merged: none: {error}")
                continue
            lines += [f"left out: {what}" for what in found.left_out]
            lines.append(f"ranks merged: {found.ranks}, {found.path}")
    return lines


def main() -> None:
    """Composes the config and writes; exit codes are listed in `train.entry`."""
    entry(_composed, "report", os.environ)


if __name__ == "__main__":
    main()
