"""What is trained for: how samples become batches, their loss, and who judges the results."""

from typing import Any, Protocol

from torch import Tensor

from ...models.block import Attend
from ..batch import Batch


class Objective(Protocol):
    """An nn.Module around `model`, so that an engine can wrap both."""

    model: Any

    def load(self, data: Any, wanted: list[int], step: int) -> Batch:
        """The samples with these global indices, the same whatever the ranks, batches and layouts are."""
        ...

    def __call__(self, part: Any, attend: Attend, denominator: float) -> Tensor:
        """This rank's *share* of the loss: the sum over what it holds, over the global number of terms."""
        ...

    def losses(self, part: Any, attend: Attend) -> Tensor:
        """The loss of each token held here, float32 [B, N], not differentiable."""
        ...

    def judge(self) -> Any:
        """The `Judge` of a model that is trained so."""
        ...
