"""Pictures of samples: grids with gutters, as PNG, and as GIF where they move."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Bytes = npt.NDArray[np.uint8]

GUTTER = (0xD2, 0xD9, 0xE0)


def tiled(clips: Array, *, columns: int, scale: int = 0, gutter: int = 4) -> Bytes:
    """Clips [n, C, F, H, W] in -1 .. 1, row by row in a grid: uint8 frames [F, height, width, 3].

    One channel is grey; of more than three, as latents have, the first three are shown. scale: each pixel
    becomes a square of this side; 0: as large as makes a tile at least 64 pixels high. gutter: pixels between
    tiles and around them.

    Raises:
        ValueError: There is no clip, or a setting is out of its range.
    """
    if clips.ndim != 5 or not len(clips):
        raise ValueError(f"clips are {clips.shape}; a grid needs [n, C, F, H, W] with n of at least 1")
    if columns < 1 or scale < 0 or gutter < 0:
        raise ValueError(f"columns is {columns}, scale {scale}, gutter {gutter}; columns >= 1, others >= 0")
    count, _, frames, height, width = clips.shape
    scale = scale or -(-64 // height)
    high, wide = scale * height + gutter, scale * width + gutter
    columns = min(columns, count)
    rows = -(-count // columns)
    page = np.empty((frames, rows * high + gutter, columns * wide + gutter, 3), np.uint8)
    page[:] = GUTTER
    colours = _colours(clips)
    for i in range(count):
        top, left = gutter + i // columns * high, gutter + i % columns * wide
        large = colours[i].repeat(scale, 1).repeat(scale, 2)
        page[:, top : top + scale * height, left : left + scale * width] = large
    return page


def _colours(clips: Array) -> Bytes:
    """[n, C, F, H, W] in -1 .. 1 -> uint8 [n, F, H, W, 3]; what is no number is black."""
    shown = clips[:, :3] if clips.shape[1] >= 3 else clips[:, :1].repeat(3, 1)
    levels = (np.nan_to_num(shown, nan=-1.0).clip(-1.0, 1.0) + 1.0) * 127.5
    return np.moveaxis(np.rint(levels).astype(np.uint8), 1, -1)


def save_png(clips: Array, path: Path, *, columns: int, scale: int = 0, gutter: int = 4) -> Path:
    """The grid as PNG; of videos the frames of a clip stand side by side, close together."""
    strips = _strips(clips) if clips.shape[2] > 1 else clips
    _image(tiled(strips, columns=columns, scale=scale, gutter=gutter)[0]).save(path, format="PNG")
    return path


def _strips(clips: Array) -> Array:
    """Frames side by side: [n, C, F, H, W] -> [n, C, 1, H, F W + F - 1], a grey line between two."""
    count, channels, frames, height, width = clips.shape
    strip = np.zeros((count, channels, 1, height, frames * (width + 1) - 1), clips.dtype)
    for frame in range(frames):
        at = frame * (width + 1)
        strip[:, :, 0, :, at : at + width] = clips[:, :, frame]
    return strip


def save_gif(
    clips: Array, path: Path, *, columns: int, scale: int = 0, gutter: int = 4, frame_s: float = 0.2
) -> Path:
    """The grid as an endless GIF, `frame_s` seconds a frame; equal frames become one that stands longer."""
    if frame_s < 0.02:
        raise ValueError(f"frame_s is {frame_s}; GIF players hold a frame for at least 0.02 s")
    first, *rest = (_image(page) for page in tiled(clips, columns=columns, scale=scale, gutter=gutter))
    first.save(
        path, format="GIF", save_all=True, append_images=rest, loop=0, duration=round(1000 * frame_s)
    )  # fmt: skip
    return path


def _image(page: Bytes) -> Any:
    from PIL import Image

    return Image.fromarray(page)


def by_class(labels: Sequence[int]) -> list[int]:
    """The order in which samples of one class follow each other: places in `labels`."""
    return sorted(range(len(labels)), key=lambda i: (labels[i], i))
