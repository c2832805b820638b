"""Handwritten digits that slide left or right: short videos with two conditions, digit and direction."""

import copy
from typing import Any

import numpy as np

from ..objective.noise import Key, Stream, bits
from .check import whole
from .clip import Clip, Traits
from .digits import CLASSES, SIDE, Digits
from .order import Order, Part

LEFT, RIGHT = 0, 1


class MovingDigits:
    """Videos [1, frames, height, width] of `Digits`; a `Clips`.

    The class is digit + 10 x direction (0 left, 1 right). Where the canvas leaves room, the start is a
    function of seed and index.

    Args:
        frames: Of a clip.
        height, width: Of the canvas, in pixels; 8 x 16 just holds five frames at two pixels a frame.
        speed: Pixels a frame.
        seed: Of the order and the starts.
        held_out: Share of the digits that is held out.

    Raises:
        ModuleNotFoundError: Scikit-learn is not installed.
        ValueError: A setting is wrong, or the digit would leave the canvas.
    """

    classes = 2 * CLASSES

    def __init__(
        self,
        *,
        frames: int = 5,
        height: int = SIDE,
        width: int = 16,
        speed: int = 2,
        seed: int = 0,
        held_out: float = 0.2,
    ) -> None:
        self.frames, self.speed = whole("data.frames", frames, 2), whole("data.speed", speed, 1)
        self.height, self.width = whole("data.height", height, SIDE), whole("data.width", width, SIDE)
        needed = SIDE + speed * (frames - 1)
        if width < needed:
            raise ValueError(
                f"data.width={width} is too narrow: {frames} frames at {speed} pixels a frame need {needed}"
            )
        self.traits = Traits(((1, frames, height, width),))
        self._seed = seed
        self._take(Digits(seed=seed, held_out=held_out), "train")

    def _take(self, digits: Digits, part: Part) -> None:
        self.digits, self._part = digits, part
        self._images, self._labels = digits.arrays()
        self._order = Order(np.arange(2 * len(digits)), self._seed, part)

    def __len__(self) -> int:
        """Each digit once in each direction."""
        return len(self._order)

    def item(self, index: int) -> Clip:
        digit, direction = divmod(self._order.record(index), 2)
        left, top = self._start(index)
        pixels = np.full((1, self.frames, self.height, self.width), -1.0, np.float32)
        for frame, x in enumerate(track(direction, left, frames=self.frames, speed=self.speed)):
            pixels[0, frame, top : top + SIDE, x : x + SIDE] = self._images[digit, 0, 0]
        return Clip(pixels, int(self._labels[digit]) + CLASSES * direction)

    def _start(self, index: int) -> tuple[int, int]:
        """Where the leftmost place of the clip's digit is."""
        rooms = self.width - SIDE - self.speed * (self.frames - 1) + 1, self.height - SIDE + 1
        x, y = bits(2, Key(self._seed, Stream.PLACE, index, int(self._part == "held_out"))).tolist()
        return x % rooms[0], y % rooms[1]

    def shape(self, index: int) -> tuple[int, int, int, int]:
        return 1, self.frames, self.height, self.width

    def held_out(self) -> "MovingDigits":
        part = copy.copy(self)
        part._take(self.digits.held_out(), "held_out")
        return part

    def describe(self) -> dict[str, Any]:
        return self.digits.describe() | {
            "corpus": "moving_digits",
            "classes": self.classes,
            "samples": len(self),
            "frames": self.frames,
            "canvas": [self.height, self.width],
            "speed": self.speed,
        }


def track(direction: int, left: int, *, frames: int, speed: int) -> list[int]:
    """The digit's left edge in each frame; `left` is the least of them."""
    steps = [left + speed * frame for frame in range(frames)]
    return steps if direction == RIGHT else steps[::-1]
