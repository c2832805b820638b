"""Pictures of samples: grids with gutters, as PNG, and as GIF or MP4 where they move."""

from collections.abc import Sequence
from fractions import Fraction
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.clip import missing

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


def save_mp4(
    clips: Array, path: Path, *, columns: int, scale: int = 0, gutter: int = 4, frame_s: float = 0.2
) -> Path:
    """The grid as H.264 in MP4, `frame_s` seconds a frame, a gutter wider where a side is odd.

    Raises:
        ValueError: A setting is out of its range.
        ModuleNotFoundError: PyAV is not installed.
    """
    if not 0.001 <= frame_s <= 60:
        raise ValueError(f"frame_s is {frame_s}; a frame of a film can last 0.001 to 60 s")
    needs_av()
    import av

    pages = tiled(clips, columns=columns, scale=scale, gutter=gutter)
    # colours are kept for each 2 x 2 pixels
    frames, high, wide = pages.shape[:3]
    even = np.empty((frames, high + high % 2, wide + wide % 2, 3), np.uint8)
    even[:] = GUTTER
    even[:, :high, :wide] = pages
    with av.open(str(path), "w", format="mp4") as film:
        stream = film.add_stream("libx264", Fraction(1000, round(1000 * frame_s)), {"crf": "14"})
        stream.height, stream.width = high + high % 2, wide + wide % 2
        stream.pix_fmt = "yuv420p"
        for page in even:
            film.mux(stream.encode(av.VideoFrame.from_ndarray(page, format="rgb24")))
        film.mux(stream.encode())
    return path


def needs_av() -> None:
    """ModuleNotFoundError where no MP4 can be written."""
    if find_spec("av") is None:
        raise missing("av", "an MP4 of samples", extra="video")


def _image(page: Bytes) -> Any:
    from PIL import Image

    return Image.fromarray(page)


def by_class(labels: Sequence[int]) -> list[int]:
    """The order in which samples of one class follow each other: places in `labels`."""
    return sorted(range(len(labels)), key=lambda i: (labels[i], i))
