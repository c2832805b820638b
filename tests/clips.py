"""Small files of images and latents for tests of data, and comparison of clips."""

import io
import json
import struct
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from longspan.train.data.clip import Clip, Clips


def png(height: int, width: int, seed: int, suffix: str = "PNG") -> bytes:
    levels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(levels).save(buffer, format=suffix)
    return buffer.getvalue()


def npy(x: np.ndarray[Any, Any]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, x)
    return buffer.getvalue()


def write_tar(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def write_safetensors(path: Path, arrays: dict[str, tuple[str, np.ndarray[Any, Any]]]) -> Path:
    header: dict[str, Any] = {"__metadata__": {"by": "hand"}}
    data = b""
    for name, (kind, x) in arrays.items():
        header[name] = {
            "dtype": kind, "shape": list(x.shape), "data_offsets": [len(data), len(data) + x.nbytes],
        }  # fmt: skip
        data += x.tobytes()
    said = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(said)) + said + data)
    return path


SMALL: dict[str, Any] = {"sizes": [[16, 24], [16, 16]], "held_out": 0.25, "flip": False}


def every(data: Clips, epoch: int = 0) -> list[Clip]:
    return [data.item(epoch * len(data) + i) for i in range(len(data))]


def same(a: Clip, b: Clip) -> bool:
    return a.label == b.label and np.array_equal(a.pixels, b.pixels)


def latents(count: int, *shape: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    return np.random.default_rng(count).standard_normal((count, *shape)).astype(np.float32)


def write_images(root: Path) -> Path:
    """24 images of two classes and two shapes in a new folder."""
    for i in range(24):
        path = root / ("cat" if i % 3 else "dog") / f"{i:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(png(20 + 10 * (i % 2), 30, i))
    return root
