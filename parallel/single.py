"""One rank holds the whole sequence."""

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.attention import attention
from ..kernels.mask import Mask
from ..kernels.options import AttentionOptions
from .comm import Traffic
from .layout import DEFAULT
from .placement import Placement, contiguous


class Single:
    """No movement; the mesh's sequence axes must be 1."""

    rank, size, group = 0, 1, None

    def __init__(self, mesh: DeviceMesh | None = None) -> None:
        self.traffic = Traffic()
        names = mesh.mesh_dim_names if mesh is not None and mesh.mesh_dim_names else ()
        for axis in {"ring", "head"} & set(names):
            if mesh is not None and mesh[axis].size() > 1:
                raise ValueError(
                    f"parallel.mesh.{axis} is {mesh[axis].size()}, but parallel=single keeps a sequence on one "
                    f"rank: set it to 1, or take parallel=ring"
                )

    def place(self, length: int, mask: Mask) -> Placement:
        return contiguous(length, 1)

    def attention(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Mask,
        placement: Placement,
        *,
        options: AttentionOptions = DEFAULT,
    ) -> tuple[Tensor, Tensor | None]:
        at = placement.spans_by_rank[0]
        out, lse = attention(q, k, v, mask, at, at, options=options)
        return out.to(q.dtype), lse
