"""Latents and texts that are nobody's: for throughput, memory and dry runs of diffusion models."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np

from .check import whole
from .clip import Clip, Floats, Traits


class MockLatents:
    """Normal random latents of one shape; a `Clips` that needs no file.

    Args:
        size: Frames, height and width of a latent, or height and width of an image's.
        channels: Of a latent.
        classes: How many there are, drawn evenly; None: one, for a model that is told none.
        text_dim, pooled_dim: Widths of a text's embeddings, and of its one vector; None: there are none.
        words: Of each text.
        samples: Latents in an epoch.
        seed: Of everything.

    Raises:
        ValueError: A setting is out of its range.
    """

    def __init__(
        self,
        *,
        size: Sequence[int],
        channels: int = 4,
        classes: int | None = 1000,
        text_dim: int | None = None,
        words: int = 512,
        pooled_dim: int | None = None,
        samples: int = 1_000_000,
        seed: int = 0,
    ) -> None:
        if len(size) not in (2, 3) or min(size) < 1:
            raise ValueError(
                f"data.size is {list(size)}; it needs height and width, or frames before them, each at "
                f"least 1"
            )
        frames, height, width = (1, *size)[-3:]
        self.classes = 1 if classes is None else whole("data.classes", classes, 1)
        self._words, self._samples = whole("data.words", words, 1), whole("data.samples", samples, 1)
        self._seed = whole("data.seed", seed, 0)
        for name, wide in (("text_dim", text_dim), ("pooled_dim", pooled_dim)):
            if wide is not None:
                whole(f"data.{name}", wide, 1)
        shape = whole("data.channels", channels, 1), frames, height, width
        self.traits = Traits((shape,), text_dim, pooled_dim)

    def __len__(self) -> int:
        return self._samples

    def item(self, index: int) -> Clip:
        """See `Clips`."""
        draw = np.random.default_rng((self._seed, index))
        label = int(draw.integers(self.classes))

        def normal(*shape: int) -> Floats:
            return draw.standard_normal(shape, np.float32)

        traits = self.traits
        return Clip(
            normal(*traits.shapes[0]),
            label,
            None if traits.text is None else normal(self._words, traits.text),
            None if traits.pooled is None else normal(traits.pooled),
        )

    def shape(self, index: int) -> tuple[int, int, int, int]:
        return self.traits.shapes[0]

    def held_out(self) -> Self:
        other = copy.copy(self)
        other._seed += 1
        return other

    def describe(self) -> dict[str, Any]:
        traits = self.traits
        facts = {"corpus": "mock latents", "size": list(traits.shapes[0]), "classes": self.classes}
        text = {"text": traits.text, "words": self._words, "pooled": traits.pooled}
        return facts | text | {"samples": self._samples, "seed": self._seed}
