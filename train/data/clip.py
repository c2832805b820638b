"""What a data set of pictures gives: one image or video with its condition, and the protocol of such sets."""

from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .check import whole

Floats = npt.NDArray[np.float32]
Shape = tuple[int, int, int, int]  # channels, frames, height, width


@dataclass(frozen=True)
class Clip:
    """An image is a clip of one frame.

    Attributes:
        pixels: float32 `[channels, frames, height, width]`, -1 (black) to 1; latents have their own range.
        label: Class, from 0.
        text: Embedding of a text, float32 `[words, width]` of at least one word, or None.
        pooled: One vector for the whole text, float32 `[width]`, or None.
    """

    pixels: Floats
    label: int
    text: Floats | None = None
    pooled: Floats | None = None

    @property
    def shape(self) -> Shape:
        """Channels, frames, height, width."""
        channels, frames, height, width = self.pixels.shape
        return channels, frames, height, width


@dataclass(frozen=True)
class Traits:
    """What the clips of a set have in common, and how those of several shapes come together.

    Attributes:
        shapes: Every shape that occurs.
        text, pooled: Width of a text's embeddings, and of its one vector; None: there are none.
        buckets: Most patch tokens of a batch, whose clips are of one shape; an index is a batch then.
        pack: Tokens of a row that holds several clips, which do not see each other; an index is a row then.

    Raises:
        ValueError: `buckets` or `pack` is out of its range, or both are set.
    """

    shapes: tuple[Shape, ...]
    text: int | None = None
    pooled: int | None = None
    buckets: int | None = None
    pack: int | None = None

    def __post_init__(self) -> None:
        for name in ("buckets", "pack"):
            if (value := getattr(self, name)) is not None:
                whole(f"data.{name}", value, 1)
        if self.buckets is not None and self.pack is not None:
            raise ValueError(f"data.buckets={self.buckets}, data.pack={self.pack}: set one of them to null")


class Clips(Protocol):
    """A data set of clips. `index // len(dataset)` is the epoch; nothing here knows of ranks."""

    @property
    def classes(self) -> int:
        """Number of classes; the class of this number stands for none (classifier-free guidance)."""
        ...

    @property
    def traits(self) -> Traits:
        """What all clips have in common."""
        ...

    def __len__(self) -> int:
        """Clips in an epoch."""
        ...

    def item(self, index: int) -> Clip:
        """The clip with this global index (any index >= 0), a pure function of it."""
        ...

    def shape(self, index: int) -> Shape:
        """The shape of `item(index)`, without reading it."""
        ...

    def held_out(self) -> "Clips":
        """The held-out part, in a fixed order."""
        ...

    def describe(self) -> dict[str, Any]:
        """What this data is, for the record of the run; can be written as JSON."""
        ...


def missing(package: str, what: str, *, extra: str = "images") -> ModuleNotFoundError:
    """The error for a package of an extra that is not installed."""
    return ModuleNotFoundError(f"{what} needs {package}: pip install longspan[{extra}]")
