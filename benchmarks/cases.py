"""What is measured: masks at lengths and head shapes, the most important first."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from random import Random
from typing import NamedTuple

import torch

from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Neighborhood, brick_order
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span, Spans

OURS = ("longspan",)
FLEX = ("flex",)
HEADLINE = 2**15  # tokens of the cases that the goals speak of


class Shape(NamedTuple):
    """Heads and their width."""

    q_heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.q_heads}/{self.kv_heads}x{self.head_dim}"


SHAPES = Shape(64, 8, 128), Shape(16, 16, 128), Shape(32, 32, 64)


@dataclass(frozen=True)
class Case:
    """Attention of `tokens` tokens over themselves. `dense` names the case that a sparse one is held
    against: causal or full, at the same length and shape.
    """

    name: str
    mask: Mask
    tokens: int
    shape: Shape
    dense: str
    dtype: torch.dtype = torch.bfloat16
    order: Spans = ()

    @property
    def at(self) -> Spans:
        """Where the tokens sit."""
        return self.order or (Span(0, self.tokens),)

    @property
    def sparse(self) -> bool:
        return self.name != self.dense

    @property
    def key(self) -> tuple[str, int, Shape, torch.dtype]:
        return self.name, self.tokens, self.shape, self.dtype

    @property
    def yardstick(self) -> tuple[str, int, Shape, torch.dtype]:
        """The `key` of the dense case."""
        return self.dense, self.tokens, self.shape, self.dtype

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"{self.name}, {self.tokens} tokens, {self.shape} heads, {dtype}"


class Job(NamedTuple):
    """A case, and who is measured at it: everyone, or those named here."""

    case: Case
    only: tuple[str, ...] = ()
    without: tuple[str, ...] = ()


def jobs(device: torch.device) -> list[Job]:
    """All there is to measure on a device, the most important first."""
    return list(on_cpu() if device.type == "cpu" else on_gpu())


def on_gpu() -> Iterator[Job]:
    """The goals' cases first. Flex, which compiles anew for each case, comes last where it is not needed."""
    leading = ("causal", "full", "s2/16")
    first = masked(HEADLINE, SHAPES[0])
    yield from (Job(case) for case in first if case.name in leading)
    yield from (Job(case) for case in first if case.name not in leading)
    others = [case for shape in SHAPES[1:] for case in masked(HEADLINE, shape)]
    yield from (Job(case) for case in others if case.name in leading)
    lengths = [2**n for n in (13, 16, 14)]
    rest = [case for length, shape in product(lengths, SHAPES) for case in masked(length, shape)]
    rest = sorted(rest, key=lambda case: case.name not in leading)
    late = [*rest, *(case for case in others if case.name not in leading)]
    yield from (Job(case, without=FLEX) for case in late)
    yield from (Job(case, only=FLEX) for case in late)


def masked(tokens: int, shape: Shape) -> list[Case]:
    """Every mask at one length and shape; bfloat16."""
    starts = (0, *sorted(Random(tokens).sample(range(1, tokens), 15)))
    causal = {
        "causal": Causal(),
        "packed": Documents(starts, Causal()),
        "window": Window(1024),
        "sinks": Window(1024) | (First(4) & Causal()),
        # blocks of 64, of which the nearest 8 are seen: 512 tokens
        **{f"s2/{stride}": Strided(64, 8, stride) & Causal() for stride in (16, 4, 32)},
    }
    # a stride of a whole brick, and windows that reach one brick further on each side: no tile is partial
    grid, brick = volume(tokens), (4, 4, 8)
    near = Neighborhood(grid, tuple(3 * x for x in brick), stride=brick)
    return [
        Case("full", Full(), tokens, shape, "full"),
        *(Case(name, mask, tokens, shape, "causal") for name, mask in causal.items()),
        Case("3d", near, tokens, shape, "full", order=brick_order(grid, brick)),
    ]


def volume(tokens: int) -> tuple[int, int, int]:
    """Frames, rows and columns of a video; `tokens` is a power of two, 8192 or more."""
    rows = 16 if tokens < 2**14 else 32
    return tokens // rows // 32, rows, 32


def on_cpu() -> Iterator[Job]:
    """Each kind of mask at heads of 64, and what training on a CPU meets. The reference, minutes at the
    longer length, is measured there for causal only.
    """
    large = {
        "causal": Causal(),
        "window": Window(1024),
        "sinks": Window(1024) | (First(4) & Causal()),
        "s2/4": Strided(64, 8, 4) & Causal(),
    }
    wide, float32 = Shape(8, 8, 64), torch.float32
    for name, mask in large.items():
        slow = () if name == "causal" else ("reference",)
        yield Job(Case(name, mask, 4096, wide, "causal", float32), without=slow)
    yield Job(Case("causal", Causal(), 4096, wide, "causal"))
    yield Job(Case("causal", Causal(), 4096, Shape(8, 2, 64), "causal", float32))
    packed = Documents(tuple(range(0, 2048, 600)), Causal())
    small = {"full": Full(), "causal": Causal(), "packed": packed, "window": Window(512)}
    for shape, (name, mask) in product((Shape(4, 4, 16), Shape(2, 2, 32)), small.items()):
        yield Job(Case(name, mask, 2048, shape, "full" if name == "full" else "causal", float32))
