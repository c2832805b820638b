"""What a data set of pictures gives: one image or video with its condition, and the protocol of such sets."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Clip:
    """An image is a clip of one frame.

    Attributes:
        pixels: float32 `[channels, frames, height, width]`, -1 (black) to 1; latents have their own range.
        label: Class, from 0.
        text: Embedding of a text, float32 `[words, width]`, or None.
    """

    pixels: Floats
    label: int
    text: Floats | None = None

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Channels, frames, height, width."""
        channels, frames, height, width = self.pixels.shape
        return channels, frames, height, width


class Clips(Protocol):
    """A data set of clips. `index // len(dataset)` is the epoch; nothing here knows of ranks."""

    @property
    def classes(self) -> int:
        """Number of classes; the class of this number stands for none (classifier-free guidance)."""
        ...

    def __len__(self) -> int:
        """Clips in an epoch."""
        ...

    def item(self, index: int) -> Clip:
        """The clip with this global index (any index >= 0), a pure function of it."""
        ...

    def shape(self, index: int) -> tuple[int, int, int, int]:
        """The shape of `item(index)`, without reading it."""
        ...

    def held_out(self) -> "Clips":
        """The held-out part, in a fixed order."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this data is, for the record of the run; can be written as JSON."""
        ...


def missing(package: str, what: str) -> ModuleNotFoundError:
    """The error for a package of the extra `images` that is not installed."""
    return ModuleNotFoundError(f"{what} needs {package}: pip install longspan[images]")
