"""The cpu backend: equal to the reference for any mask, in steps that waste little, also at the edge."""

from random import Random

import pytest
import torch

from longspan.kernels.attention import AttentionOptions, Unsupported, attention
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.patterns import Strided
from longspan.kernels.span import Span, Spans, total
from longspan.kernels.steps import steps
from longspan.kernels.tile import area
from masks import Phase, random_mask, random_spans
from oracle import (
    LIMITS,
    Which,
    both_backends,
    cast,
    check_against_reference,
    distance,
    door,
    gradients,
    inputs,
    partial,
    sizes,
)


@pytest.mark.parametrize("seed", range(40))
def test_cpu_equals_reference(seed: int) -> None:
    """Any mask, spans, heads, head dims and lengths; zero and tiny rows of dout among them."""
    draw = Random(seed)
    length, batch = draw.choice([9, 61, 300, 701]), draw.choice([1, 2])
    mask = random_mask(draw, length, batch=batch)
    at = random_spans(draw, length), random_spans(draw, length)
    if draw.random() < 0.3:
        at = (at[0], at[0])
    heads = draw.choice([(1, 1), (2, 2), (4, 2), (3, 1), (6, 3)])
    dtype, dim = draw.choice([*LIMITS]), draw.choice([1, 7, 16, 24])
    given = inputs(*sizes(at), heads, batch=batch, dim=dim, dtype=dtype, seed=seed)
    if draw.random() < 0.3:
        given[3][:, ::3] = 0
        given[3][:, 1::5] *= 1e-30
    check_against_reference(mask, at, given)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize(("mask", "length", "dim"), [
    (Causal(), 500, 64),
    (Window(200), 700, 72),
    (Documents(((0, 130, 400, 400), (0, 300, 400, 430)), Causal() & (Window(150) | First(4))), 450, 80),
    (Phase(3) & Causal(), 400, 33),
    (Strided(32, 2, 4) & Causal(), 600, 16),
], ids=str)  # fmt: skip
def test_cpu_equals_reference_over_many_tiles(mask: Mask, length: int, dim: int, dtype: torch.dtype) -> None:
    at = (Span(0, length),)
    given = inputs(length, length, (4, 2), batch=mask.batch(), dim=dim, dtype=dtype)
    check_against_reference(mask, (at, at), given)


@pytest.mark.parametrize("mask", [
    Full(), Causal(), Window(300), Causal() & (Window(300) | First(4)), Documents((0, 700, 1210), Causal()),
    Documents((0, 700, 1210), Window(200)), Phase(3), Phase(3) & Window(99, 400),
    Strided(32, 2, 4) & Causal(),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("at", [
    ((Span(0, 1500),), (Span(0, 1500),)),
    ((Span(701, 700),), (Span(0, 1401),)),
    ((Span(0, 400), Span(1200, 400)), (Span(400, 800),)),
    ((Span(0, 500, 1, 3),), (Span(1, 500, 1, 3),)),
], ids=["whole", "chunk", "zigzag", "striped"])  # fmt: skip
def test_steps_meet_each_visible_pair_once(mask: Mask, at: tuple[Spans, Spans]) -> None:
    heads = 2
    right = visible(lower(mask, *at, heads, torch.device("cpu"))).expand(1, heads, *map(total, at))
    for head in range(heads if mask.per_head else 1):
        met = torch.zeros(right.shape[2:], dtype=torch.int64)
        for step in steps(mask, *at, kv_heads=heads, group=(0, head)):
            seen = torch.ones(step.rows.stop - step.rows.start, total(step.keys), dtype=torch.int64)
            seen = seen.tril() if step.causal else seen if step.seen is None else step.seen.long()
            for span, part in zip(step.keys, seen.split([s.length for s in step.keys], 1), strict=True):
                met[step.rows, span.start : span.start + span.length] += part
        assert torch.equal(met, right[0, head].long())


@pytest.mark.parametrize(("mask", "most"), [
    (Full(), 1.0), (Causal(), 1.01), (Documents((0, 700, 1210), Causal()), 1.01), (Window(300), 1.4),
    (Causal() & (Window(300) | First(4)), 1.5), (Documents((0, 700, 1210), Window(300)), 1.4),
    (Strided(64, 2, 4) & Causal(), 1.4), (Strided(32, 1, 8) & Causal(), 1.9),
], ids=str)  # fmt: skip
def test_little_work_is_on_hidden_pairs(mask: Mask, most: float) -> None:
    at, heads = (Span(0, 1500),), 2
    met = 0.0
    for head in range(heads):
        for step in steps(mask, at, at, kv_heads=heads, group=(0, head if mask.per_head else 0)):
            met += (step.rows.stop - step.rows.start) * total(step.keys) * (0.5 if step.causal else 1)
    assert met / heads <= most * area(mask, at, at, heads)


@pytest.mark.parametrize(
    ("at_q", "calls"), [((Span(0, 1500),), 1), ((Span(333, 700),), 2), ((Span(3, 500, 1, 3),), 1)]
)
def test_a_causal_shard_is_one_triangle_and_one_rectangle(at_q: Spans, calls: int) -> None:
    at_k = at_q if calls == 1 else (Span(0, 1033),)
    found = list(steps(Causal(), at_q, at_k, kv_heads=1))
    assert [x.causal for x in found] == [True, False][:calls]
    assert all(x.seen is None for x in found)


@pytest.mark.parametrize(
    "options", [AttentionOptions(softcap=2.0), AttentionOptions(normalizer="sigmoid")], ids=str
)
def test_the_cpu_backend_refuses_what_it_cannot_do(options: AttentionOptions) -> None:
    given = inputs(4, 4)
    at = (Span(0, 4),)
    with pytest.raises(Unsupported, match="backend='reference' does"):
        attention(*given[:3], Causal(), at, at, options=options, backend="cpu")
    out, _ = attention(*given[:3], Causal(), at, at, options=options)
    assert torch.equal(out, attention(*given[:3], Causal(), at, at, options=options, backend="reference")[0])


# Numbers at the edge.


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12])
def test_gradients_scale_with_dout(size: float) -> None:
    """delta goes to the cpu operator as a quotient of two gradients: neither may overflow nor vanish."""
    at = (Span(0, 40),)
    given = inputs(40, 40, dtype=torch.float32)
    run = door(Causal(), (at, at), "cpu")
    base = gradients(run, given)
    scaled = gradients(run, (*given[:3], given[3] * size, given[4] * size))
    assert all(distance(a.double() / size, b) < 1e-5 for a, b in zip(scaled, base, strict=True))


@pytest.mark.parametrize("size", [1e-42, 1e-30, 1e-3])
def test_a_tiny_dout_beside_a_large_dlse(size: float) -> None:
    """delta / dout would overflow: those rows take another way, and none is lost."""
    at = (Span(0, 40),)
    given = inputs(40, 40, dtype=torch.float32)
    given[3][:, 3::4] *= size
    check_against_reference(Causal(), (at, at), given)


@both_backends
def test_large_scores_do_not_overflow(backend: Which) -> None:
    at = (Span(0, 64),)
    given = inputs(64, 64, dtype=torch.float32)
    for x in given[:2]:
        x.mul_(3e3)
    right, right_lse = partial(door(Window(20), (at, at), "reference"), cast(given))
    out, lse = partial(door(Window(20), (at, at), backend), given)
    assert out.isfinite().all() and distance(lse, right_lse) < 1e-6 and distance(out, right) < 1e-2


@pytest.mark.parametrize("scale", [-0.4, 0.0])
@pytest.mark.parametrize("mask", [Causal(), Full(), Window(9), Causal() & First(5)], ids=str)
def test_a_scale_that_is_not_positive(mask: Mask, scale: float) -> None:
    at = (Span(0, 300),)
    given = inputs(300, 300, (4, 2), dtype=torch.float64)
    check_against_reference(mask, (at, at), given, options=AttentionOptions(scale=scale))
