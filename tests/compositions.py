"""Random compositions of all masks, each with heads, rows and placements: what every backend is tried on."""

from dataclasses import dataclass
from random import Random

from longspan.kernels.mask import Mask
from longspan.kernels.span import Spans
from masks import random_spans
from patterns import KV_HEADS, random_pattern

COUNT = 200


@dataclass(frozen=True)
class Composition:
    """A mask, query heads and kv heads, rows of the batch, and where queries and keys sit."""

    mask: Mask
    heads: tuple[int, int]
    batch: int
    at: tuple[Spans, Spans]


def composition(seed: int) -> Composition:
    """`&`, `|`, documents, a mask a head; all heads or some of them; odd lengths, split and strided spans."""
    draw = Random(seed)
    length, batch = draw.choice([23, 37, 41, 59]), draw.choice([1, 1, 2])
    mask, kv_heads = random_pattern(draw, length, batch), draw.choice([4, 4, 2, 1])
    if kv_heads < KV_HEADS:
        mask = mask.heads(draw.choices(range(KV_HEADS), k=kv_heads), of=KV_HEADS)
    heads = kv_heads * draw.choice([1, 1, 2]), kv_heads
    return Composition(mask, heads, batch, (random_spans(draw, length), random_spans(draw, length)))
