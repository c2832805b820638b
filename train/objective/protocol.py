"""What is trained for: how samples become batches, their loss, and who judges the results."""

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from ...kernels.mask import Mask
from ...models.block import Attends
from ...parallel.layout import Layout
from ...parallel.placement import Placement
from ..batch import Batch


class Objective(Protocol):
    """An nn.Module around `model`, so that an engine can wrap both."""

    model: Any

    def load(self, data: Any, wanted: list[int], step: int) -> Batch:
        """The samples with these global indices, the same whatever the ranks, batches and layouts are."""
        ...

    def context(self, data: Any) -> int:
        """Tokens of a sequence, over all ranks. ValueError if the data does not fit the model."""
        ...

    def placement(self, data: Any, layout: Layout, mask: Mask) -> Placement:
        """Who holds what of a sequence of `context` tokens. Refuses what the layout cannot serve of the
        data's batches.
        """
        ...

    def flops(self, batches: Sequence[Batch]) -> float:
        """FLOP of a step over these, forward and backward, counting only pairs that the masks let through."""
        ...

    def __call__(self, part: Any, attend: Attends, denominator: float) -> Tensor:
        """This rank's *share* of the loss: the sum over what it holds, over the global number of terms."""
        ...

    def losses(self, part: Any, attend: Attends) -> Tensor:
        """The loss of each token held here, float32 [B, N], not differentiable."""
        ...

    def judge(self) -> Any:
        """The `Judge` of a model that is trained so."""
        ...
