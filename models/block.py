"""The parts that models share: what attends, grouped-query attention, and the gated MLP."""

from collections.abc import Sequence
from typing import Literal, Protocol, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.mask import Mask
from .rope import rotate


class Attend(Protocol):
    """Attention over the whole sequence for the tokens held here; the trainer binds it to a layout and a
    placement.
    """

    def __call__(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """q [B, T, Hq, D], k, v [B, T, Hkv, D] -> [B, T, Hq, D]."""
        ...


Bias = Literal["none", "qkv", "qkvo"]
Attends = Attend | Sequence[Attend]  # one for all layers, or several that take turns


def attend_of(attends: Attends, layer: int) -> Attend:
    """What attends in a layer."""
    return attends[layer % len(attends)] if isinstance(attends, Sequence) else attends


class HeadNorm(nn.RMSNorm):
    """RMSNorm of each head in the weight's dtype, returned in x's: under autocast the two differ."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.to(self.weight.dtype)).to(x.dtype)


class Attention(nn.Module):
    """Grouped-query self-attention (Ainslie et al. 2023) with RoPE and, if asked, RMS-normalised queries and
    keys. bias: of which projections.
    """

    def __init__(
        self, dim: int, *, heads: int, kv_heads: int, head_dim: int, qk_norm: bool, eps: float,
        bias: Bias = "none",
    ) -> None:  # fmt: skip
        super().__init__()
        if bias not in get_args(Bias):
            raise ValueError(f"model.bias is {bias!r}; it can be {', '.join(get_args(Bias))}")
        self.head_dim = head_dim
        self.q = nn.Linear(dim, heads * head_dim, bias=bias != "none")
        self.k = nn.Linear(dim, kv_heads * head_dim, bias=bias != "none")
        self.v = nn.Linear(dim, kv_heads * head_dim, bias=bias != "none")
        self.o = nn.Linear(heads * head_dim, dim, bias=bias == "qkvo")
        self.q_norm = HeadNorm(head_dim, eps=eps) if qk_norm else nn.Identity()
        self.k_norm = HeadNorm(head_dim, eps=eps) if qk_norm else nn.Identity()

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, mask: Mask) -> Tensor:
        """x [B, T, dim], angles of the T tokens' global positions -> [B, T, dim]."""
        q, k, v = (
            layer(x).unflatten(-1, (-1, self.head_dim)) for layer in (self.q, self.k, self.v)
        )  # [B, T, H, D]
        out = attend(rotate(self.q_norm(q), angles), rotate(self.k_norm(k), angles), v, mask)
        y: Tensor = self.o(out.flatten(2))
        return y


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.gate = nn.Linear(dim, hidden, bias=False)
        self.up = nn.Linear(dim, hidden, bias=False)
        self.down = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y
