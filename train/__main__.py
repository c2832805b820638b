"""torchrun --nproc-per-node 2 -m longspan.train experiment=quickstart"""

import os
import sys

import hydra
from omegaconf import DictConfig

from .entry import entry
from .job import Launch


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="train")
def _composed(cfg: DictConfig) -> None:
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    launch = Launch.of(os.environ)
    # DeepSpeed looks for it, and a process that was started alone has none
    os.environ.setdefault("LOCAL_RANK", str(launch.local_rank))
    hydra_cfg = HydraConfig.get()
    if hydra_cfg.mode == RunMode.MULTIRUN:
        from .sweep import one_job

        one_job(launch, list(hydra_cfg.overrides.task), f"{hydra_cfg.sweep.dir}/{hydra_cfg.sweep.subdir}")
        return
    from .run import train

    sys.exit(train(cfg, launch))


def main() -> None:
    """Composes the config and trains; exit codes are listed in `entry`."""
    entry(_composed, "train", os.environ)


if __name__ == "__main__":
    main()
