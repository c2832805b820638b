"""A mask that differs from layer to layer."""

from dataclasses import dataclass

from .fields import require
from .heads import Composed
from .mask import Bound, Mask


@dataclass(frozen=True)
class PerLayer(Composed):
    """`rest` in every `every`-th layer of a model, first in layer every - 1, and `most` in the others.

    `layered` gives each layer its own. Until then it stands for all layers together: what either sees.
    """

    most: Mask
    rest: Mask
    every: int = 4

    def __post_init__(self) -> None:
        require(self, 1, "every")
        for name in ("most", "rest"):
            if not isinstance(value := getattr(self, name), Mask) or isinstance(value, Bound):
                raise ValueError(f"PerLayer.{name} is {value}; it must be a mask that is not bound to heads")

    @property
    def shift_invariant(self) -> bool:  # type: ignore[override]
        return self.most.shift_invariant and self.rest.shift_invariant

    @property
    def per_head(self) -> bool:  # type: ignore[override]
        return self.most.per_head or self.rest.per_head

    def batch(self) -> int:
        return max(self.most.batch(), self.rest.batch())

    def parts(self, of: int) -> Mask:
        return self.most | self.rest

    def layers(self, layers: int) -> tuple[int, int]:
        """How many of the first `layers` layers take `most`, and how many `rest`."""
        return layers - layers // self.every, layers // self.every

    def at(self, layer: int) -> tuple[Mask, int]:
        """The mask of a layer, and its number among the layers that take the same."""
        before = self.layers(layer)
        return (self.rest, before[1]) if (layer + 1) % self.every == 0 else (self.most, before[0])
