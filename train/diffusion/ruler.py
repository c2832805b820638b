"""What samples are held against: a classifier that knows the data, features of real clips, and the clips."""

from collections.abc import Iterator
from functools import cached_property
from math import prod
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..data.clip import Clips
from ..data.digits import Digits
from ..data.moving_digits import MovingDigits
from .classify import DigitClassifier, motion
from .metrics import Features, Gaussian, frechet, nearest, pixels

Array = npt.NDArray[Any]
# Of a clip, beyond which pixels are no features.
MOST_PIXELS = 1024
# Training clips that samples are held against, and how many are read at once.
MOST_CLIPS = 10_000
_CHUNK = 256


class Sampled(NamedTuple):
    """Samples [n, C, F, H, W] at one guidance, and the classes that were asked for."""

    guidance: float
    clips: Array
    labels: tuple[int, ...]


class Ruler:
    """Made once of the training data, for samples of one shape.

    features: of clips for the Frechet distance; `pixels` if they are few, and the clips of one shape. The
    first 10,000 training clips are taken.
    """

    def __init__(self, data: Clips, features: Literal["pixels"] | Features = "pixels") -> None:
        self.data = data
        digits = data.digits if isinstance(data, MovingDigits) else data
        self._classifier = DigitClassifier(digits) if isinstance(digits, Digits) else None
        alike = len(data.traits.shapes) == 1
        self._small = alike and prod(data.traits.shapes[0]) <= MOST_PIXELS
        self._features: Features | None = None
        if callable(features):
            self._features = features
        elif self._small:
            self._features = pixels
        self._floors: dict[int, float] = {}

    def measure(self, found: Sampled) -> dict[str, float]:
        """Conditional accuracy, the Frechet distance with that of as many held-out clips (`frechet_floor`),
        and the mean distance to the nearest clip.
        """
        values, count = self._accuracy(found.clips, np.array(found.labels)), len(found.clips)
        fits = self._small and found.clips.shape[1:] == self.data.traits.shapes[0]
        if self._features is not None and count > 1 and (fits or self._features is not pixels):
            values["frechet"] = frechet(Gaussian.of(self._features(found.clips)), self._real)
            if self._held(count) > 1:
                values["frechet_floor"] = self._floor(self._held(count))
        if fits:
            values["nearest"] = float(nearest(found.clips, self._there)[0].mean())
        return values | {"count": count}

    def real(self, count: int) -> dict[str, float]:
        """The same of as many held-out clips: what no model is expected to beat."""
        if len(self.data.traits.shapes) > 1:
            return {}
        held = self.data.held_out()
        there = [held.item(i) for i in range(self._held(count))]
        found = Sampled(1.0, np.stack([c.pixels for c in there]), tuple(c.label for c in there))
        return {name: value for name, value in self.measure(found).items() if name != "frechet_floor"}

    def _held(self, count: int) -> int:
        return min(count, len(self.data.held_out()))

    def _floor(self, count: int) -> float:
        if count not in self._floors:
            features = np.concatenate(list(self._chunks(self.data.held_out(), count)))
            self._floors[count] = frechet(Gaussian.of(features), self._real)
        return self._floors[count]

    @cached_property
    def _real(self) -> Gaussian:
        return Gaussian.of(np.concatenate(list(self._chunks(self.data, min(MOST_CLIPS, len(self.data))))))

    @cached_property
    def _there(self) -> Array:
        return np.stack([self.data.item(i).pixels for i in range(min(MOST_CLIPS, len(self.data)))])

    def _chunks(self, data: Clips, count: int) -> Iterator[Array]:
        """Features of the first clips, [n, d] at a time; those of one shape together."""
        assert self._features is not None
        for at in range(0, count, _CHUNK):
            by_shape: dict[Any, list[Array]] = {}
            for i in range(at, min(at + _CHUNK, count)):
                clip = data.item(i)
                by_shape.setdefault(clip.shape, []).append(clip.pixels)
            yield from (self._features(np.stack(clips)) for clips in by_shape.values())

    def _accuracy(self, clips: Array, labels: Array) -> dict[str, float]:
        """Shares of clips that are what was asked for."""
        if self._classifier is None or clips.shape[1:] != self.data.traits.shapes[0]:
            return {}
        if not isinstance(self.data, MovingDigits):
            return {"accuracy": self._classifier.accuracy(clips, labels)}
        found = motion(clips, labels, self._classifier, speed=self.data.speed)
        return {
            "accuracy": found.both, "digit": found.digit, "direction": found.direction,
            "jitter": found.jitter,
        }  # fmt: skip
