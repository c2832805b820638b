"""python -m longspan.train.encode data.path=my/images vae=stabilityai/sd-vae-ft-ema out=my/latents"""

import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import numpy.typing as npt
import torch
from omegaconf import DictConfig
from torch import Tensor

from .config import Run, made, typed
from .data.clip import Clip, Clips
from .data.images import Images
from .entry import entry, guarded
from .job import Launch

Encode = Callable[[Tensor], Tensor]  # images [n, 3, H, W] in -1 .. 1 -> latents [n, C, H / 8, W / 8]


@dataclass
class Encoding:
    """The root keys of conf/encode.yaml."""

    run: Run = field(default_factory=Run)
    seed: int = 0
    vae: str = ""
    out: str = ""
    device: str = "auto"
    batch: int = 8
    shard: int = 1024
    data: Any = None


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="encode")
def _composed(cfg: DictConfig) -> None:
    launch = Launch.of(os.environ)
    sys.exit(guarded(lambda: encode(typed(cfg, Encoding), launch), launch))


def encode(cfg: DictConfig, launch: Launch) -> int:
    """Latents of all images, training and held-out, as npz files for `data=latents`; a rank takes a part."""
    for name in ("batch", "shard"):
        if cfg[name] < 1:
            raise ValueError(f"{name} is {cfg[name]}; it must be at least 1")
    out = Path(cfg.out)
    if out.is_dir() and any(out.glob(f"latents-{launch.rank:03}-*.npz")):
        raise FileExistsError(f"out={out} holds latents already; give a new folder")
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    device = torch.device(kind, launch.local_rank) if kind == "cuda" else torch.device(kind)
    vae, shift, scale = load_vae(cfg.vae, device)
    data = made(cfg.data)
    if not isinstance(data, Images) or cfg.data.flip:
        raise ValueError(f"data is {type(data).__name__}: take data=images data.flip=false")
    count = write(data, vae, out, batch=cfg.batch, shard=cfg.shard, part=(launch.rank, launch.world))
    say = f"data=latents data.path={out} data.shift={shift} data.scale={scale}"
    print(f"{count} latents in {out}: train with {say}")
    return 0


def load_vae(name: str, device: torch.device) -> tuple[Encode, float, float]:
    """The encoder's mean, and the shift and the scale that its latents are trained with.

    Raises:
        OSError: diffusers is not installed, or there is no such model.
    """
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError as error:
        raise OSError("encoding images needs diffusers: pip install longspan[vae]") from error
    vae = AutoencoderKL.from_pretrained(name, use_safetensors=True).to(device).eval()

    @torch.no_grad()
    def mean(images: Tensor) -> Tensor:
        found: Tensor = vae.encode(images.to(device)).latent_dist.mode()
        return found.float().cpu()

    return mean, float(vae.config.shift_factor or 0.0), float(vae.config.scaling_factor)


def write(
    data: Clips, encoded: Encode, out: Path, *, batch: int, shard: int, part: tuple[int, int] = (0, 1)
) -> int:
    """Encodes this part of the clips into files of `shard` latents of one shape and labels; how many."""
    out.mkdir(parents=True, exist_ok=True)
    waiting: dict[tuple[int, ...], list[tuple[npt.NDArray[np.float32], int]]] = {}
    count = files = 0

    def put(shape: tuple[int, ...]) -> None:
        nonlocal files
        rows = waiting.pop(shape)
        path = out / f"latents-{part[0]:03}-{files:05}.npz"
        np.savez(path, latents=np.stack([x for x, _ in rows]), labels=np.array([y for _, y in rows]))
        files += 1

    for clips in alike(data, batch, part):
        images = torch.from_numpy(np.stack([clip.pixels[:, 0] for clip in clips]))
        for latent, clip in zip(encoded(images).numpy(), clips, strict=True):
            waiting.setdefault(latent.shape, []).append((latent, clip.label))
            count += 1
            if len(waiting[latent.shape]) == shard:
                put(latent.shape)
    for shape in list(waiting):
        put(shape)
    return count


def alike(data: Clips, batch: int, part: tuple[int, int]) -> Iterator[list[Clip]]:
    """This part of all clips, `batch` of one shape at a time."""
    waiting: dict[tuple[int, ...], list[Clip]] = {}
    every = chain.from_iterable(((x, i) for i in range(len(x))) for x in (data, data.held_out()))
    for number, (source, i) in enumerate(every):
        if number % part[1] != part[0]:
            continue
        clip = source.item(i)
        waiting.setdefault(clip.shape, []).append(clip)
        if len(waiting[clip.shape]) == batch:
            yield waiting.pop(clip.shape)
    yield from waiting.values()


def main() -> None:
    """Composes the config and encodes; exit codes are listed in `entry`."""
    entry(_composed, "encode", os.environ)


if __name__ == "__main__":
    main()
