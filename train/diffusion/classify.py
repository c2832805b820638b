"""Is a sample what was asked for? An independent classifier of digits, still or moving."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..data.clip import missing
from ..data.digits import CLASSES, SIDE, Digits
from ..data.moving_digits import LEFT, RIGHT, track

Array = npt.NDArray[Any]
Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
# Of the kernel, for pixels in -1 .. 1; scikit-learn's own example has 0.001 for 0 .. 16.
_GAMMA = 0.064
# Ink in the middle counts more than at the rim, so that a track runs through the middle of its digit.
_RIM = 0.01


class DigitClassifier:
    """A support-vector classifier trained on real images. ModuleNotFoundError without scikit-learn."""

    def __init__(self, digits: Digits) -> None:
        try:
            from sklearn.svm import SVC
        except ModuleNotFoundError as error:
            raise missing("scikit-learn", "the accuracy of digits") from error
        images, labels = digits.arrays()
        self._svc = SVC(gamma=_GAMMA).fit(images.reshape(len(images), -1), labels)

    def __call__(self, images: Array) -> Ints:
        """Classes of images [n, ..., 8, 8], int64 [n]. One that is not finite is of class -1."""
        flat = images.reshape(len(images), -1)
        finite = np.logical_and.reduce(np.isfinite(flat), axis=1)
        found: Ints = self._svc.predict(np.where(finite[:, None], flat, 0.0).clip(-1.0, 1.0)).astype(np.int64)
        return np.where(finite, found, -1)

    def accuracy(self, images: Array, labels: Array) -> float:
        """Share of images that are of the class asked for."""
        return float((self(images) == np.asarray(labels)).mean())


@dataclass(frozen=True)
class Motion:
    """What moving digits are seen to do.

    digit, direction, both: shares of the clips in which they are right. jitter: mean absolute difference
    between a digit and itself a frame later, 0 in real clips.
    """

    digit: float
    direction: float
    both: float
    jitter: float


def motion(clips: Array, labels: Array, classifier: DigitClassifier, *, speed: int = 2) -> Motion:
    """Judges clips [n, 1, F, H, W] by the class asked for, digit + 10 x direction.

    A digit is where ink is: of all tracks in both directions, the one that covers most of it is taken, and
    its frames' mean is classified.
    """
    labels = np.asarray(labels)
    crops, direction = _followed(clips[:, 0].astype(np.float64), speed)
    digit_right = classifier(crops.mean(1)) == labels % CLASSES
    direction_right = direction == labels // CLASSES
    jitter = np.abs(np.diff(crops, axis=1)).mean()
    return Motion(
        float(digit_right.mean()),
        float(direction_right.mean()),
        float((digit_right & direction_right).mean()),
        float(jitter),
    )


def _followed(clips: Array, speed: int) -> tuple[Array, Ints]:
    """Along the best track of each clip [n, F, H, W]: crops [n, F, 8, 8], and the direction, int64 [n]."""
    count, frames, height, width = clips.shape
    room = width - SIDE - speed * (frames - 1)
    off = (np.arange(SIDE) - (SIDE - 1) / 2) ** 2
    weights = 1.0 - _RIM * (off[:, None] + off)
    best, chosen = np.full(count, -np.inf), np.zeros(count, np.int64)
    crops = np.zeros((count, frames, SIDE, SIDE))
    for direction in (LEFT, RIGHT):
        for top in range(height - SIDE + 1):
            for left in range(room + 1):
                path = track(direction, left, frames=frames, speed=speed)
                seen = np.stack(
                    [clips[:, f, top : top + SIDE, x : x + SIDE] for f, x in enumerate(path)], axis=1
                )
                covered = (weights * (seen + 1.0)).sum((1, 2, 3))
                better = covered > best
                best, chosen = np.where(better, covered, best), np.where(better, direction, chosen)
                crops[better] = seen[better]
    return crops, chosen
