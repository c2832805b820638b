"""One rank holds the whole sequence."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import backward, forward
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from .comm import Traffic
from .halves import Joined, Saved, Triple
from .placement import Placement, contiguous


class Single(Joined):
    """No movement."""

    rank, size, group = 0, 1, None

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.traffic = Traffic()

    def place(self, length: int, mask: Mask) -> Placement:
        return contiguous(length, 1)

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement, options: AttentionOptions
    ) -> tuple[Tensor, Tensor | None, Saved]:
        at = placement.spans_by_rank[0]
        out, lse = forward(q, k, v, mask, at, at, options=options)
        return out, lse, (q, k, v, lse)

    def backward(
        self,
        dout: Tensor,
        delta: Tensor | None,
        saved: Saved,
        mask: Mask,
        placement: Placement,
        options: AttentionOptions,
    ) -> Triple:
        q, k, v, lse = saved
        assert q is not None and k is not None and v is not None
        at = placement.spans_by_rank[0]
        return backward(dout, delta, q, k, v, lse, mask, at, at, options=options)
