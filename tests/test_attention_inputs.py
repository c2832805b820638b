"""What attention must not depend on: precision, strides, odd sizes, split heads, packing, hidden tokens."""

import math

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionOptions,
    Unsupported,
    attention,
    backward,
    combine,
    forward,
    nothing,
)
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.span import Span, Spans, cut
from masks import Phase
from oracle import (
    LIMITS,
    MINUS_INFINITY,
    Given,
    Which,
    both_backends,
    cast,
    check_against_reference,
    distance,
    door,
    gradients,
    inputs,
    partial,
)

# Clause 2: the precision of partials.


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_partials_of_half_precision_are_float32(backend: Which, dtype: torch.dtype) -> None:
    """Eight merged parts err no more than float32 does from the same rounded inputs."""
    mask, at = Causal(), (Span(0, 96),)
    given = inputs(96, 96, (4, 2), dim=32, dtype=dtype)
    q, k, v, dout, _ = given
    exact = cast(given)
    right, right_lse = partial(door(mask, (at, at), "reference"), exact)
    result = nothing(q)
    for i in range(0, 96, 12):
        piece = slice(i, i + 12)
        part = forward(q, k[:, piece], v[:, piece], mask, at, cut(at, i, i + 12), backend=backend)
        assert part[0].dtype == torch.float32 and part[1] is not None and part[1].dtype == torch.float32
        result = combine(result, part)
    assert result[1] is not None
    assert distance(result[0], right) < 1e-6 and distance(result[1], right_lse) < 1e-6
    delta = (exact[3] * right).sum(-1).transpose(1, 2)
    found = backward(dout, delta.float(), q, k, v, right_lse.float(), mask, at, at, backend=backend)
    expected = backward(exact[3], delta, *exact[:3], right_lse, mask, at, at, backend="reference")
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.float32 and distance(a, b) < 2e-6


@both_backends
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_errs_no_more_than_the_cast(backend: Which, dtype: torch.dtype) -> None:
    at = (Span(0, 80),)
    given = inputs(80, 80, (4, 2), dim=16, dtype=dtype)
    found = gradients(door(Causal(), (at, at), backend), given)
    right = gradients(door(Causal(), (at, at), "reference"), cast(given))
    for a, b in zip(found, right, strict=True):
        assert a.dtype == dtype
        assert distance(a, b) <= 1.01 * distance(b.to(dtype), b)


@both_backends
def test_autocast_does_not_reach_the_partials(backend: Which) -> None:
    at = (Span(0, 40),)
    run, given = door(Causal(), (at, at), backend), inputs(40, 40, dtype=torch.float32)
    expected = *partial(run, given), *gradients(run, given)
    with torch.autocast("cpu", torch.bfloat16):
        found = *partial(run, given), *gradients(run, given)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b)


# Clause 4: any strides, lengths, heads and head dims.


def strided(x: Tensor) -> dict[str, Tensor]:
    """The same values in other memory."""
    wide = torch.full((*x.shape[:-1], 2 * x.shape[-1]), math.nan, dtype=x.dtype)
    wide[..., ::2] = x
    padded = torch.full((x.shape[0], x.shape[1] + 3, *x.shape[2:]), math.nan, dtype=x.dtype)
    padded[:, 2:-1] = x
    return {
        "heads first": x.transpose(1, 2).contiguous().transpose(1, 2),
        "tokens first": x.transpose(0, 1).contiguous().transpose(0, 1),
        "dim first": x.movedim(3, 0).contiguous().movedim(0, 3),
        "every other": wide[..., ::2],
        "from the middle": padded[:, 2:-1],
    }


@both_backends
@pytest.mark.parametrize("kind", strided(torch.zeros(1, 1, 1, 1)))
def test_inputs_need_not_be_contiguous(backend: Which, kind: str) -> None:
    at = (Span(0, 33),)
    mask = Window(9) | First(2)
    given = inputs(33, 33, (4, 2), batch=2, dim=6)
    q, k, v, dout = (strided(x)[kind] for x in given[:4])
    out, lse = partial(door(mask, (at, at), backend), given)
    odd_out, odd_lse = forward(q, k, v, mask, at, at, backend=backend)
    delta = (given[3] * out).sum(-1).transpose(1, 2)
    right = backward(given[3], delta.contiguous(), *given[:3], lse, mask, at, at, backend=backend)
    lse_tokens_first = lse.transpose(1, 2).contiguous().transpose(1, 2)
    found = backward(dout, delta, q, k, v, lse_tokens_first, mask, at, at, backend=backend)
    for a, b in zip((out, lse, *right), (odd_out, odd_lse, *found), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@both_backends
def test_a_broadcast_gradient_will_do(backend: Which) -> None:
    """`out.sum()` hands back one number with strides of 0."""
    at = (Span(0, 20),)
    q, k, v = (x.requires_grad_() for x in inputs(20, 20)[:3])
    broadcast = torch.autograd.grad(attention(q, k, v, Causal(), at, at, backend=backend)[0].sum(), (q, k, v))
    out = attention(q, k, v, Causal(), at, at, backend=backend)[0]
    for a, b in zip(broadcast, torch.autograd.grad(out, (q, k, v), torch.ones_like(out)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", LIMITS, ids=str)
@pytest.mark.parametrize("dim", [1, 3, 16, 72, 80, 129])
@pytest.mark.parametrize("heads", [(5, 5), (6, 3), (3, 1)], ids=["MHA", "GQA", "MQA"])
def test_odd_lengths_heads_and_head_dims(heads: tuple[int, int], dim: int, dtype: torch.dtype) -> None:
    at = (Span(5, 37),), (Span(0, 41),)
    check_against_reference(Causal(), at, inputs(37, 41, heads, batch=2, dim=dim, dtype=dtype))


# Clauses 5, 7, 8: heads and documents.


@both_backends
def test_a_head_keeps_its_identity_when_heads_are_split(backend: Which) -> None:
    """Clause 5: kv heads 2 and 0 alone, bound to their global index, give what they give among all four."""
    mask, at = Phase(4) & Causal(), (Span(0, 50),)
    given = inputs(50, 50, (8, 4))

    def run(x: Given, mask: Mask) -> list[Tensor]:
        own = door(mask, (at, at), backend)
        out, lse = partial(own, x)
        return [out, lse.transpose(1, 2), *gradients(own, x)]

    whole = run(given, mask)
    kv, of_q = [2, 0], [4, 5, 0, 1]
    q, k, v, dout, dlse = given
    own = q[:, :, of_q], k[:, :, kv], v[:, :, kv], dout[:, :, of_q], dlse[:, of_q]
    part = run(own, mask.heads(kv, of=4))
    picked = [x[:, :, i] for x, i in zip(whole, (of_q, of_q, of_q, kv, kv), strict=True)]
    for a, b in zip(part, picked, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    # unbound, they would be taken for heads 0 and 1
    assert distance(run(own, mask)[0], picked[0]) > 0.01


@both_backends
def test_grouped_queries_are_repeated_keys(backend: Which) -> None:
    """Clause 7."""
    at = (Span(0, 35),)
    given = inputs(35, 35, (6, 2))

    grouped = door(Causal(), (at, at), backend)

    def repeated(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return grouped(q, k.repeat_interleave(3, 2), v.repeat_interleave(3, 2))

    found, right = ([*partial(run, given), *gradients(run, given)] for run in (grouped, repeated))
    for a, b in zip(found, right, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@both_backends
@pytest.mark.parametrize("inner", [None, Causal(), First(2) | Window(3)], ids=str)
def test_packed_documents_are_the_documents_alone(backend: Which, inner: Mask | None) -> None:
    """Clause 8: sinks and windows restart, each row of the batch has its own documents."""
    rows = ((0, 13, 40), (0, 29, 31))
    at = (Span(0, 40),)
    given = inputs(40, 40, (2, 2), batch=2)
    out, lse = partial(door(Documents(rows, inner), (at, at), backend), given)
    for row, starts in enumerate(rows):
        for a, b in zip(starts, (*starts[1:], 40), strict=True):
            q, k, v = (x[row : row + 1, a:b] for x in given[:3])
            own_at = (Span(0, b - a),)
            alone, alone_lse = attention(q, k, v, inner or Full(), own_at, own_at, backend="reference")
            torch.testing.assert_close(out[row : row + 1, a:b], alone, rtol=1e-12, atol=1e-12)
            torch.testing.assert_close(lse[row : row + 1, :, a:b], alone_lse, rtol=1e-12, atol=1e-12)


# No leaks.


def results(given: Given, mask: Mask, at: Spans, backend: Which) -> list[Tensor]:
    """out, lse, dq, dk, dv, tokens first."""
    run = door(mask, (at, at), backend)
    found = *partial(run, given), *gradients(run, given)
    return [x.movedim(dim, 0) for x, dim in zip(found, (1, 2, 1, 1, 1), strict=True)]


@both_backends
@pytest.mark.parametrize(
    "mask", [Causal(), Window(70), Documents((0, 77, 200), Causal()), First(9) | Window(30)], ids=str
)
@pytest.mark.parametrize("token", [5, 150, 299])
def test_a_hidden_token_changes_nothing_bit_for_bit(backend: Which, mask: Mask, token: int) -> None:
    at = (Span(0, 300),)
    given = inputs(300, 300, (2, 1), dtype=torch.float32)
    seen = visible(lower(mask, at, at, 1, torch.device("cpu")))[0, 0].expand(300, 300)
    before = results(given, mask, at, backend)
    for x in given[:3]:
        x[:, token] += 3.0
    after = results(given, mask, at, backend)
    # a query notices the keys that it sees; a key also the queries that see it, and so their other keys
    blind = ~seen[:, token]
    blind[token] = False
    for a, b in zip(before[:3], after[:3], strict=True):
        assert torch.equal(a[blind], b[blind])
    noticed = seen[:, token] | (torch.arange(300) == token)
    blind_keys = ~seen[noticed].any(0)
    for a, b in zip(before[3:], after[3:], strict=True):
        assert torch.equal(a[blind_keys], b[blind_keys])
    assert not torch.equal(before[0][~blind], after[0][~blind])


def test_a_nan_does_not_leave_its_document() -> None:
    """Documents end where steps end, so that the cpu backend never multiplies the NaN of another by zero."""
    at, mask = (Span(0, 300),), Documents((0, 100, 200), Causal())
    given = inputs(300, 300, dtype=torch.float32)
    for x in given[:4]:
        x[:, 120] = math.nan
    for x in results(given, mask, at, "cpu"):
        assert x[:100].isfinite().logical_or(x[:100] == MINUS_INFINITY).all() and x[200:].isfinite().all()


def test_tensors_of_several_devices_are_refused() -> None:
    q, at = torch.ones(1, 3, 1, 2), (Span(0, 3),)
    with pytest.raises(ValueError, match="q, k, v must be on one device, got cpu, meta, meta"):
        attention(q, q.to("meta"), q.to("meta"), Full(), at, at)
    with pytest.raises(ValueError, match="delta is on meta, but q is on cpu"):
        rows = torch.ones(1, 1, 3)
        backward(q, rows.to("meta"), q, q, q, rows, Full(), at, at)


def test_what_is_refused_is_refused_without_data_too() -> None:
    q, at = torch.ones(2, 3, 1, 2, device="meta"), (Span(0, 3),)
    with pytest.raises(ValueError, match="documents for 3 rows, but the batch has 2"):
        attention(q, q, q, Documents(((0,), (0,), (0,))), at, at)
    with pytest.raises(Unsupported, match="backend='cpu' does softmax without softcap"):
        attention(q, q, q, Full(), at, at, options=AttentionOptions(normalizer="sigmoid"), backend="cpu")
