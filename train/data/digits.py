"""Scikit-learn's handwritten digits: 1,797 real images of 8 x 8 pixels."""

import hashlib
from typing import Any

import numpy as np

from .check import fraction, whole
from .clip import Clip, Floats, Traits, missing
from .order import Parted, split
from .sample import Ints

SIDE = 8
CLASSES = 10


class Digits(Parted):
    """Grey images [1, 1, 8, 8], ten classes; a `Clips`. What is held out does not depend on the seed.

    The data is the test part of UCI's "Optical Recognition of Handwritten Digits" (Alpaydin and Kaynak 1998).

    Args:
        seed: Of the order.
        held_out: Share of the images that is held out.

    Raises:
        ModuleNotFoundError: Scikit-learn is not installed.
        ValueError: A setting is wrong.
    """

    classes = CLASSES
    traits = Traits(((1, 1, SIDE, SIDE),))

    def __init__(self, *, seed: int = 0, held_out: float = 0.2) -> None:
        seed = whole("data.seed", seed, 0)
        self._images, self._labels = load_digits()
        super().__init__(split(len(self._images), fraction("data.held_out", held_out, ends=False)), seed)

    def item(self, index: int) -> Clip:
        record = self._order.record(index)
        return Clip(self._images[record, None, None].copy(), int(self._labels[record]))

    def shape(self, index: int) -> tuple[int, int, int, int]:
        return 1, 1, SIDE, SIDE

    def arrays(self) -> tuple[Floats, Ints]:
        """Every image of this part, float32 [n, 1, 1, 8, 8], and its class, in file order."""
        members = self._split.part(self._part)
        return self._images[members, None, None], self._labels[members]

    def describe(self) -> dict[str, Any]:
        return {
            "corpus": "digits",
            "part": self._part,
            "sha256": hashlib.sha256(self._images.tobytes() + self._labels.tobytes()).hexdigest(),
            "classes": self.classes,
            "samples": len(self),
            "bad": 0,
            "bad_records": [],
        }


def load_digits() -> tuple[Floats, Ints]:
    """All images, float32 [1797, 8, 8] in -1 .. 1, and their classes, int64 [1797]."""
    try:
        from sklearn import datasets
    except ModuleNotFoundError as error:
        raise missing("scikit-learn", "data=digits") from error
    found = datasets.load_digits()
    return (found.images / 8.0 - 1.0).astype(np.float32), found.target.astype(np.int64)
