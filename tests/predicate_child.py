"""The predicates of all masks inside a Triton kernel, in a process of its own: interpreted, or compiled only.

`TRITON_INTERPRET=1 python tests/predicate_child.py` prints the masks whose kernel differs from torch's view.
`python tests/predicate_child.py 90` compiles all the predicates as one for that architecture.
"""

import sys
from typing import Any

import torch
import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget

from longspan.kernels import lower as lowered
from longspan.kernels.heads import either
from longspan.kernels.mask import Mask
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.predicate import constant, operands, visible
from longspan.kernels.span import Span
from patterns import EACH

HEADS = 4
AT = (Span(3, 30), Span(40, 20))


@triton.jit
def visible_kernel(OUT, mask, NQ, NK, TREE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr):  # type: ignore[no-untyped-def]
    head = tl.program_id(0)
    m, n = tl.arange(0, BM)[:, None], tl.arange(0, BN)[None, :]
    # of a grid of one axis always 0
    row = tl.program_id(1)
    seen = visible(TREE, mask, row, head, m, n, NQ, NK)
    tl.store(OUT + (head * NQ + m) * NK + n, seen.to(tl.int8), mask=(m < NQ) & (n < NK))


def arguments(mask: Mask) -> tuple[torch.Tensor, tuple[Any, ...]]:
    low = lowered.lower(mask, AT, AT, HEADS, torch.device("cpu"))
    out = torch.full((HEADS, len(low.q), len(low.k)), -1, dtype=torch.int8)
    return lowered.visible(low), (out, operands(low), len(low.q), len(low.k), constant(low.tree), 64, 64)


def interpret() -> None:
    for mask in EACH:
        want, given = arguments(mask)
        visible_kernel[(HEADS,)](*given)
        if not torch.equal(given[0].bool(), want.expand(1, *given[0].shape)[0]) or (given[0] < 0).any():
            print(mask)


class Device:
    """A GPU that can be compiled for: what Triton asks of a driver before a launch."""

    def __init__(self, architecture: int) -> None:
        self.architecture = architecture

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.architecture, 32)

    def get_current_device(self) -> int:
        return self.architecture

    def get_current_stream(self, device: int) -> int:
        return 0


def build(architecture: int) -> None:
    triton.runtime.driver.set_active(Device(architecture))
    one_each = {type(m): m for m in EACH if not isinstance(m, Neighborhood)}
    grids: list[Mask] = [Neighborhood((8, 8), 3), Neighborhood((8, 8), 3, dilation=2, causal=True)]
    given = arguments(either([*one_each.values(), *grids]))[1]
    visible_kernel.warmup(*given, grid=(HEADS,))


if __name__ == "__main__":
    build(int(sys.argv[1])) if len(sys.argv) > 1 else interpret()
