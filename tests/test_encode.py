"""Images become latents: which files are written, and that they are read back."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hydra import compose, initialize_config_module

from clips import every, write_images
from longspan.train.config import typed
from longspan.train.data.images import Images
from longspan.train.data.latents import Latents
from longspan.train.encode import Encoding, encode, load_vae, write
from longspan.train.job import Launch

SIZES = [[16, 24], [16, 16]]


def test_every_image_becomes_a_latent_of_its_class(tmp_path: Path) -> None:
    """Any encoder: here means of squares. Two ranks take a part each."""
    folder = write_images(tmp_path / "images")
    data = Images(path=folder, sizes=SIZES, cache=tmp_path / "c", flip=False, held_out=0.25)
    out, seen = tmp_path / "out", list[int]()

    def encoded(images: torch.Tensor) -> torch.Tensor:
        seen.append(len(images))
        return F.avg_pool2d(images, 8)

    parts = [write(data, encoded, out, batch=4, shard=5, part=(rank, 2)) for rank in range(2)]
    assert parts == [12, 12] and max(seen) == 4
    for path in out.glob("*.npz"):
        assert len(np.load(path)["latents"]) <= 5
    back = Latents(path=out, cache=tmp_path / "c", held_out=0.25)
    assert set(back.traits.shapes) == {(3, 1, 2, 3), (3, 1, 2, 2)}
    want = sorted(
        (F.avg_pool2d(torch.from_numpy(c.pixels[:, 0]), 8).numpy().tobytes(), c.label)
        for part in (data, data.held_out())
        for c in every(part)
    )
    found = [(c.pixels.tobytes(), c.label) for part in (back, back.held_out()) for c in every(part)]
    assert sorted(found) == want


def test_the_command_asks_for_diffusers_or_encodes(tmp_path: Path) -> None:
    with initialize_config_module("longspan.conf", version_base="1.3"):
        words = [f"data.path={write_images(tmp_path / 'images')}", f"run.root={tmp_path}", "device=cpu"]
        words += [f"vae={tmp_path / 'vae'}", f"out={tmp_path / 'out'}", f"data.sizes={SIZES}"]
        cfg = typed(compose("encode", overrides=words), Encoding)
    try:
        from diffusers import AutoencoderKL
    except ModuleNotFoundError:
        with pytest.raises(OSError, match=r"needs diffusers: pip install longspan\[vae\]"):
            encode(cfg, Launch())
        return
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    tiny = AutoencoderKL(**blocks, block_out_channels=[8], norm_num_groups=4, latent_channels=4)
    tiny.save_pretrained(tmp_path / "vae")
    assert encode(cfg, Launch()) == 0
    data = Latents(path=tmp_path / "out", cache=tmp_path / "c")
    assert len(data) + len(data.held_out()) == 24 and data.traits.shapes[0][0] == 4
    mean, _, scale = load_vae(str(tmp_path / "vae"), torch.device("cpu"))
    assert scale == tiny.config.scaling_factor
    images = Images(path=tmp_path / "images", sizes=SIZES, cache=tmp_path / "c", flip=False)
    found = [torch.from_numpy(c.pixels[:, 0]) for part in (data, data.held_out()) for c in every(part)]
    for clip in (c for part in (images, images.held_out()) for c in every(part)):
        want = mean(torch.from_numpy(clip.pixels[:, 0])[None])[0]
        assert min(float((x - want).abs().max()) for x in found if x.shape == want.shape) < 1e-4
    with pytest.raises(FileExistsError, match="holds latents already"):
        encode(cfg, Launch())
