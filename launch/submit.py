"""longspan submit experiment=tiny slurm.nodes=2: a run, or a sweep of them, as a SLURM job.

The config is composed once, into job.yaml in the run folder, which every rank of every start reads; the batch
script stands beside it.
"""

import argparse
import datetime
import itertools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from ..train.config import SECRET, ConfigError, Root, made, typed
from ..train.entry import entry, guarded
from ..train.job import Launch, check_numbers, run_folder
from ..train.record import write_whole
from .requeue import SCRIPT, queued
from .slurm import Slurm, rendered

CONFIG = "job.yaml"
# As in conf/train.yaml: Hydra makes no folders and no logs of its own.
HEADER = """\
# Composed by longspan submit. Every rank reads it:
# python -m longspan.train --config-path {folder} --config-name job
defaults:
- _self_
- override hydra/job_logging: none
- override hydra/hydra_logging: none
hydra:
  run: {{dir: .}}
  output_subdir: null
"""


@dataclass
class Submission(Root):
    """The root keys of conf/submit.yaml: those of train, and slurm."""

    slurm: Slurm = field(default_factory=Slurm)


@dataclass(frozen=True)
class Plan:
    """What is submitted: the texts of the files in `folder` by their names there, the script among them."""

    folder: Path
    files: dict[str, str]

    @property
    def script(self) -> str:
        return self.files[SCRIPT]


def composed(overrides: Sequence[str]) -> list[DictConfig]:
    """The config of each job. Raises Hydra's errors for overrides that do not compose."""
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return [compose("submit", overrides=job) for job in expanded(overrides)]


def plan(configs: Sequence[DictConfig], now: datetime.datetime) -> Plan:
    """The files of a run folder, or with several configs of a sweep's. Writes nothing.

    Raises ValueError for a job that could not run.
    """
    asked = [_checked(cfg) for cfg in configs]
    if any(slurm != asked[0] for slurm in asked) or any(cfg.run != configs[0].run for cfg in configs):
        raise ConfigError("the jobs of a sweep share a batch script: slurm.* and run.* take one value each")
    folder = run_folder(configs[0], now).absolute()
    if len(configs) == 1:
        files = {CONFIG: handed(configs[0], folder)}
        return Plan(folder, files | {SCRIPT: rendered(asked[0], folder)})
    texts = {f"{i}/{CONFIG}": handed(cfg, folder / str(i)) for i, cfg in enumerate(configs)}
    return Plan(folder, texts | {SCRIPT: rendered(asked[0], folder, jobs=len(configs))})


def expanded(overrides: Sequence[str]) -> Iterator[list[str]]:
    """The overrides of each job: every combination of the values in `a=1,2 b=choice(3,4) c=glob(*)`. Raises
    HydraException for a sweep that names no values, and for a glob unless Hydra is initialized.
    """
    choices = []
    there = GlobalHydra.instance()
    parser = OverridesParser.create(there.config_loader() if there.is_initialized() else None)
    for override in parser.parse_overrides(list(overrides)):
        if override.is_sweep_override():
            key = override.get_key_element()
            try:
                values = list(override.sweep_string_iterator())
            except HydraException as error:
                values, why = [], f": {error}"
            else:
                why = ", which fits none"
            if not values:
                raise HydraException(f"{override.input_line}{why}; a sweep lists values, such as {key}=a,b")
            choices.append([f"{key}={value}" for value in values])
        else:
            choices.append([override.input_line or ""])
    return (list(job) for job in itertools.product(*choices))


def handed(cfg: DictConfig, folder: Path) -> str:
    """The text of job.yaml: the train config in `cfg` with this run folder, interpolations as they are."""
    plain = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(plain, dict)
    del plain["slurm"]
    plain["run"] = {**plain["run"], "dir": str(folder)}
    return HEADER.format(folder=folder) + OmegaConf.to_yaml(OmegaConf.create(plain))


def _checked(cfg: DictConfig) -> Slurm:
    """What SLURM is asked for, after all checks that need no device."""
    for path in secret_values(OmegaConf.to_container(cfg, resolve=False)):
        raise ConfigError(
            f"{path} looks like a secret, and would be written into the run folder: give it as "
            f"'{path}=${{oc.env:NAME}}', which the ranks resolve"
        )
    slurm: Any = OmegaConf.to_object(typed(cfg, Submission).slurm)
    check_numbers(cfg)
    if cfg.resume == "never":
        raise ConfigError(
            "resume=never would refuse the run's own checkpoints when SLURM starts it again: take a new "
            "run.name and resume=auto"
        )
    slurm.check()
    made(cfg.parallel.mesh).degrees(slurm.nodes * slurm.on_a_node, node=slurm.on_a_node)
    return slurm


def secret_values(node: Any, path: str = "") -> Iterator[str]:
    """The paths of values that stand there in the clear under a key that looks like a secret."""
    if isinstance(node, dict):
        for key, value in node.items():
            here = f"{path}.{key}".lstrip(".")
            if SECRET.search(str(key)) and isinstance(value, str) and "${" not in value:
                yield here
            yield from secret_values(value, here)
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from secret_values(value, f"{path}[{i}]")


def write(work: Plan) -> None:
    """Writes the run folder. A folder with the same config is gone on with, also on other nodes; ValueError
    if it holds anything else, or a job that is queued or running.
    """
    folder = work.folder
    if waiting := queued(folder / SCRIPT):
        raise ValueError(
            f"run.dir={folder}: job {', '.join(waiting)} is queued or running there; scancel it first"
        )
    there = folder / CONFIG if CONFIG in work.files else folder / "0" / CONFIG
    if folder.exists() and any(folder.iterdir()) and not there.is_file():
        raise ValueError(
            f"run.dir={folder} holds something that this command did not make: take another run.name"
        )
    for name, text in work.files.items():
        if name != SCRIPT and (folder / name).is_file() and (changed := _changed(folder / name, text)):
            raise ValueError(
                f"run.dir={folder} holds a run with another config ({'; '.join(changed[:3])}): take another "
                f"run.name, or change {folder / name} and give sbatch {folder / SCRIPT}"
            )
    for name, text in work.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        write_whole(folder / name, text)


def _changed(path: Path, text: str) -> list[str]:
    """What differs between the config in a file and one that would replace it, in words."""
    old, new = (dict(_leaves(yaml.safe_load(t), "")) for t in (path.read_text(), text))
    none = "nothing"
    return [
        f"{key} is {old.get(key, none)} there and {new.get(key, none)} here"
        for key in sorted(old.keys() | new.keys())
        if old.get(key, none) != new.get(key, none)
    ]


def _leaves(node: Any, path: str) -> Iterator[tuple[str, Any]]:
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}".lstrip("."))
    else:
        yield path, node


def queue(work: Plan) -> str:
    """Writes the run folder and submits it; the job's id. ValueError if SLURM is not here or refuses it."""
    if shutil.which("sbatch") is None:
        raise ValueError("sbatch is not found: submit where SLURM is, or see the script with --dry-run")
    write(work)
    script = work.folder / SCRIPT
    done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise ValueError(f"sbatch refuses {script}: {' '.join(done.stderr.split())}")
    return done.stdout.strip().split(";")[0]


def submit(configs: Sequence[DictConfig], *, dry_run: bool) -> int:
    """Shows the batch script, or submits it; the exit code."""
    work = plan(configs, datetime.datetime.now())
    if dry_run:
        print(work.script, end="")
    else:
        print(f"job {queue(work)}: {work.folder}")
    return 0


def main() -> None:
    """Reads the command line; exit codes are listed in `train.entry`."""
    parser = argparse.ArgumentParser(
        prog="longspan submit",
        description="Submits a run to SLURM; an override with several values makes an array of runs.",
        epilog=f"slurm.*, with what conf/submit.yaml gives: {Slurm.__doc__}",
    )
    parser.add_argument(
        "--dry-run", action="store_true", help="show the batch script; write and submit nothing"
    )
    parser.add_argument("overrides", nargs="*", help="as for longspan train, and slurm.nodes=2 ...")
    given = parser.parse_intermixed_args()

    def work() -> None:
        configs = composed(given.overrides)
        sys.exit(guarded(lambda: submit(configs, dry_run=given.dry_run), Launch()))

    entry(work, "submit", os.environ)


if __name__ == "__main__":
    main()
