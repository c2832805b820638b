"""Random crops of scikit-learn's two photographs: real images of any size without a download."""

import copy
import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..objective.noise import Key, Stream, bits
from .check import fraction, whole
from .clip import Clip, Traits, missing
from .order import Part

_NAMES = ("china.jpg", "flower.jpg")


class Photos:
    """Crops [3, 1, height, width] of two photographs of 427 x 640 pixels, two classes; a `Clips`.

    Held out are crops of the photographs' right ends, which training never sees.

    Args:
        size: Height and width of a crop, in pixels.
        shrink: Each pixel is the mean of a square of this side of the photograph.
        samples: Crops in an epoch.
        held_out: Share of the width that is held out, at least as wide as a crop.
        seed: Of the crops.

    Raises:
        ModuleNotFoundError: Scikit-learn or Pillow is not installed.
        ValueError: A setting is wrong, or a crop does not fit.
    """

    classes = len(_NAMES)

    def __init__(
        self,
        *,
        size: Sequence[int] = (64, 64),
        shrink: int = 1,
        samples: int = 4096,
        held_out: float = 0.25,
        seed: int = 0,
    ) -> None:
        if len(size) != 2:
            raise ValueError(f"data.size={list(size)} must be height and width")
        self.size = whole("data.size", size[0], 1), whole("data.size", size[1], 1)
        self.traits = Traits(((3, 1, *self.size),))
        self._samples, self._seed = whole("data.samples", samples, 1), whole("data.seed", seed, 0)
        photos = _shrunk(_load(), whole("data.shrink", shrink, 1))
        self._sha256 = hashlib.sha256(photos.tobytes()).hexdigest()
        height, width = photos.shape[1:3]
        border = width - max(self.size[1], round(fraction("data.held_out", held_out, ends=False) * width))
        self._strips = {"train": photos[:, :, :border], "held_out": photos[:, :, border:]}
        if self.size[0] > height or self.size[1] > border:
            raise ValueError(
                f"data.size={list(size)} does not fit: at data.shrink={shrink} and data.held_out={held_out} "
                f"training crops come from {height} x {border} pixels"
            )
        self._part: Part = "train"

    def __len__(self) -> int:
        return self._samples

    def item(self, index: int) -> Clip:
        """A crop of either photograph, anywhere. Raises IndexError if `index` is negative."""
        if index < 0:
            raise IndexError(f"item {index}: indices start at 0")
        strips, (high, wide) = self._strips[self._part], self.size
        drawn = bits(3, Key(self._seed, Stream.PLACE, index, int(self._part == "held_out"))).tolist()
        photo = drawn[0] % self.classes
        top, left = drawn[1] % (strips.shape[1] - high + 1), drawn[2] % (strips.shape[2] - wide + 1)
        crop = strips[photo, top : top + high, left : left + wide]
        return Clip(np.moveaxis(crop, -1, 0)[:, None].copy(), photo)

    def shape(self, index: int) -> tuple[int, int, int, int]:
        return 3, 1, *self.size

    def held_out(self) -> "Photos":
        part = copy.copy(self)
        part._part = "held_out"
        return part

    def describe(self) -> dict[str, Any]:
        return {
            "corpus": "photos",
            "part": self._part,
            "sha256": self._sha256,
            "classes": self.classes,
            "size": list(self.size),
            "samples": len(self),
            "bad": 0,
            "bad_records": [],
        }


def _load() -> npt.NDArray[np.uint8]:
    """Both photographs, uint8 [2, 427, 640, 3]."""
    try:
        from sklearn.datasets import load_sample_image
    except ModuleNotFoundError as error:
        raise missing("scikit-learn", "data=photos") from error
    try:
        return np.stack([load_sample_image(name) for name in _NAMES])
    except ImportError as error:
        raise missing("pillow", "data=photos") from error


def _shrunk(photos: npt.NDArray[np.uint8], by: int) -> npt.NDArray[np.float32]:
    """Means of squares, float32 in -1 .. 1; a rest at the ends is cut off."""
    count, height, width, channels = photos.shape
    high, wide = height // by, width // by
    if not high or not wide:
        raise ValueError(f"data.shrink={by} leaves nothing of photographs of {height} x {width} pixels")
    squares = photos[:, : high * by, : wide * by].reshape(count, high, by, wide, by, channels)
    return (squares.mean((2, 4), dtype=np.float64) / 127.5 - 1.0).astype(np.float32)
