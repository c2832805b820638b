"""The door to the kernels: rows without keys, merging, the choice of a backend, input that does not fit."""

import math
from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.kernels.attention import (
    AttentionOptions,
    attention,
    backward,
    chosen,
    combine,
    forward,
    merge,
    nothing,
)
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Unsupported
from longspan.kernels.span import Span, cut
from masks import random_mask, random_spans
from oracle import (
    MINUS_INFINITY,
    Which,
    both_backends,
    dense,
    distance,
    door,
    gradients,
    inputs,
    partial,
    plain,
    sizes,
    split,
)

# The oracle itself.


@pytest.mark.parametrize("options", [
    AttentionOptions(),
    AttentionOptions(scale=0.7),
    AttentionOptions(softcap=1.5),
    AttentionOptions(normalizer="sigmoid", bias=-math.log(40)),
    AttentionOptions(normalizer="sigmoid", bias=-1.0, softcap=2.0, scale=0.5),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("seed", range(4))
def test_the_reference_is_plain_attention_with_a_dense_mask(options: AttentionOptions, seed: int) -> None:
    draw = Random(seed)
    heads, batch = (4, 2), 2
    mask, at = random_mask(draw, 40, batch=2), (random_spans(draw, 40), random_spans(draw, 40))
    given = inputs(*sizes(at), heads, batch=batch, seed=seed)
    seen = dense(mask, *at, heads)
    ours = door(mask, at, "reference", options)
    out, lse = ours(*given[:3])
    right_out, right_lse = plain(*given[:3], seen, options)
    assert distance(out, right_out) < 1e-12
    assert (lse is None) == (options.normalizer == "sigmoid")
    if lse is not None:
        assert torch.equal(lse.isinf(), right_lse.isinf())
        torch.testing.assert_close(lse, right_lse, rtol=1e-12, atol=1e-12)
    right = gradients(lambda q, k, v: plain(q, k, v, seen, options), given)
    assert all(distance(a, b) < 1e-12 for a, b in zip(gradients(ours, given), right, strict=True))


# Clause 1: rows without a visible key.

DEAD = Causal(), ((Span(0, 8),), (Span(4, 9),))  # queries 0 to 3 see nothing


@both_backends
def test_a_row_without_keys_is_zero_with_lse_minus_infinity(backend: Which) -> None:
    out, lse = partial(door(*DEAD, backend), inputs(8, 9))
    assert not out[:, :4].any() and out[:, 4:].all() and out.isfinite().all()
    assert (lse[..., :4] == MINUS_INFINITY).all() and lse[..., 4:].isfinite().all()


@both_backends
@pytest.mark.parametrize("dlse", [0.0, 7.0, math.inf, math.nan])
def test_a_row_without_keys_has_no_gradient_whatever_its_dlse(backend: Which, dlse: float) -> None:
    run, given = door(*DEAD, backend), inputs(8, 9)
    leaves = [x.requires_grad_() for x in given[:3]]
    given[4][..., :4] = dlse
    found = torch.autograd.grad(partial(run, given), leaves, given[3:])
    assert not found[0][:, :4].any()
    given[4][..., :4] = 0
    given[3][:, :4] = 0
    expected = torch.autograd.grad(partial(run, given), leaves, given[3:])
    for a, b in zip(found, expected, strict=True):
        assert a.isfinite().all()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@both_backends
@pytest.mark.parametrize("mask", [First(0), Full()], ids=["all hidden", "no keys"])
def test_where_nothing_is_visible_nothing_comes_out(backend: Which, mask: Mask) -> None:
    keys = 6 if mask == First(0) else 0
    given = inputs(5, keys)
    at = (Span(0, 5),), (Span(0, keys),)
    run = door(mask, at, backend)
    out, lse = partial(run, given)
    assert out.shape == given[0].shape and not out.any()
    assert lse.shape == given[4].shape and (lse == MINUS_INFINITY).all()
    for grad, x in zip(gradients(run, given), given[:3], strict=True):
        assert grad.shape == x.shape and not grad.any()


def test_merging_rows_without_keys_makes_no_nan() -> None:
    """In values and gradients, for either sign of infinity, and the living rows beside them are untouched."""
    for first in (MINUS_INFINITY, math.inf):
        for second in (MINUS_INFINITY, math.inf, 0.3):
            parts = [torch.randn(1, 3, 1, 4, dtype=torch.float64) for _ in range(2)]
            lses = [torch.full((1, 1, 3), x, dtype=torch.float64) for x in (first, second)]
            lses[0][..., 2], parts[0][:, :2] = 0.5, 0.0
            if math.isinf(second):
                parts[1].zero_()
            leaves = [x.requires_grad_() for x in (*parts, *lses)]
            out, lse = merge((parts[0], lses[0]), (parts[1], lses[1]))
            alive = lse.isfinite()
            assert torch.equal(
                lse[..., :2], torch.full_like(lse[..., :2], MINUS_INFINITY if math.isinf(second) else 0.3)
            )
            assert torch.equal(out[:, :2], parts[1][:, :2])
            grads = torch.autograd.grad([out.sum() + lse[alive].sum()], leaves)
            assert all(x.isfinite().all() for x in (out, *grads))
            assert not grads[2][..., :2].any()
            if math.isinf(second):
                assert torch.equal(out[:, 2], parts[0][:, 2]) and not grads[3].any()


def test_merge_takes_plus_infinity_for_no_key_and_does_not_care_for_order() -> None:
    out, lse = torch.randn(2, 5, 3, 4), torch.randn(2, 3, 5)
    other = torch.zeros_like(out), torch.full_like(lse, math.inf)
    for found in (merge((out, lse), other), merge(other, (out, lse))):
        assert torch.equal(found[0], out) and torch.equal(found[1], lse)
    a, b = (out, lse), (torch.randn_like(out), torch.randn_like(lse))
    for x, y in zip(merge(a, b), merge(b, a), strict=True):
        torch.testing.assert_close(x, y)


def test_a_sink_is_a_merge_with_a_value_of_zero() -> None:
    """Clause 9: one more logit per head in the denominator."""
    given = inputs(7, 7, (2, 2))
    at = (Span(0, 7),)
    sink = torch.tensor([0.4, -1.1], dtype=torch.float64)
    out, lse = partial(door(Causal(), (at, at), "cpu"), given)
    found, _ = merge((out, lse), (torch.zeros(1, dtype=torch.float64), sink[None, :, None]))
    scores = torch.einsum("bqhd,bkhd->bhqk", *given[:2]) * 8**-0.5
    scores = scores.masked_fill(~torch.ones(7, 7, dtype=torch.bool).tril(), MINUS_INFINITY)
    scores = torch.cat((scores, sink[None, :, None, None].expand(1, 2, 7, 1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(found, torch.einsum("bhqk,bkhd->bqhd", scores, given[2]))


# Partials: merging and summing over a split of the keys.


@both_backends
@pytest.mark.parametrize("seed", range(12))
def test_merging_over_any_split_of_the_keys_is_the_whole(backend: Which, seed: int) -> None:
    """out, lse and the gradients through both, beside autograd on the definition."""
    draw = Random(seed)
    heads = draw.choice([(2, 2), (4, 2), (3, 1)])
    mask, at = random_mask(draw, 44), (random_spans(draw, 44), random_spans(draw, 44))
    given = inputs(*sizes(at), heads, seed=seed)
    pieces = split(draw, at[1], 3)
    seen = dense(mask, *at, heads)

    def merged(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        result = nothing(q)
        for piece, spans in pieces:
            result = combine(result, door(mask, (at[0], spans), backend)(q, k[:, piece], v[:, piece]))
        return result

    def right(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor | None]:
        return plain(q, k, v, seen, AttentionOptions())

    for a, b in zip(partial(merged, given), partial(right, given), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for a, b in zip(gradients(merged, given), gradients(right, given), strict=True):
        assert a.isfinite().all() and distance(a, b) < 1e-10


@both_backends
@pytest.mark.parametrize("seed", range(8))
def test_raw_gradients_over_parts_sum_to_the_whole(backend: Which, seed: int) -> None:
    """With the lse and delta of the whole row: what a ring does on each hop."""
    draw = Random(seed)
    mask, at = random_mask(draw, 50), (random_spans(draw, 50), random_spans(draw, 50))
    q, k, v, dout, dlse = inputs(*sizes(at), (4, 2), seed=seed)
    if draw.random() < 0.5:
        dout[:, ::2] = 0
    out, lse = forward(q, k, v, mask, *at, backend=backend)
    assert lse is not None
    delta = (dout * out).sum(-1).transpose(1, 2) - dlse.masked_fill(lse.isinf(), 0.0)
    whole = backward(dout, delta, q, k, v, lse, mask, *at, backend="reference")
    summed = [torch.zeros_like(x) for x in (q, k, v)]
    for piece, spans in split(draw, at[1], 3):
        dq, dk, dv = backward(
            dout, delta, q, k[:, piece], v[:, piece], lse, mask, at[0], spans, backend=backend
        )
        summed[0] += dq
        summed[1][:, piece] += dk
        summed[2][:, piece] += dv
    assert all(distance(a, b) < 1e-12 for a, b in zip(summed, whole, strict=True))


@both_backends
def test_a_foreign_lse_of_plus_infinity_has_no_gradient(backend: Which) -> None:
    """As -inf: rows that another kernel found without keys."""
    mask, at = DEAD
    q, k, v, dout, delta = inputs(8, 9)
    _, lse = partial(door(mask, at, backend), (q, k, v, dout, delta))
    delta[..., :4] = 0
    for sign in (1, -1):
        foreign = lse.masked_fill(lse.isinf(), sign * math.inf)
        grads = backward(dout, delta, q, k, v, foreign, mask, *at, backend=backend)
        assert not grads[0][:, :4].any() and all(g.isfinite().all() and g.any() for g in grads)


@both_backends
def test_a_loss_of_lse_alone_or_out_alone_has_its_gradient(backend: Which) -> None:
    """Then dout is all zero, and the cpu operator cannot be told delta through it."""
    given, at = inputs(40, 40, (2, 2)), (Span(0, 40),)
    leaves = [x.requires_grad_() for x in given[:3]]
    seen = dense(Causal(), at, at, (2, 2))
    for which in (0, 1):
        ours = partial(door(Causal(), (at, at), backend), given)[which]
        found = torch.autograd.grad(ours, leaves, given[3 + which])
        definition = plain(*given[:3], seen, AttentionOptions())[which]
        right = torch.autograd.grad(definition, leaves, given[3 + which], materialize_grads=True)
        assert all(distance(a, b) < 1e-12 for a, b in zip(found, right, strict=True))


# Clause 3: the choice of a backend.


def test_auto_can_be_asked_and_takes_what_the_options_need() -> None:
    q = torch.zeros(1, 2, 1, 4)
    assert chosen(q) == "cpu"
    assert chosen(q, AttentionOptions(softcap=2.0)) == "reference"
    assert chosen(q, AttentionOptions(normalizer="sigmoid")) == "reference"
    assert chosen(q, backend="reference") == "reference"
    with pytest.raises(ValueError, match="backend is 'fast'; allowed: auto, reference, cpu, triton"):
        chosen(q, backend="fast")  # type: ignore[arg-type]


def test_partials_of_sigmoid_add() -> None:
    q, k, v, *_ = inputs(30, 30)
    options, at = AttentionOptions(normalizer="sigmoid", bias=-math.log(30)), (Span(0, 30),)
    whole, lse = attention(q, k, v, Causal(), at, at, options=options)
    first, second = (
        attention(q, k[:, x], v[:, x], Causal(), at, cut(at, x.start, x.stop), options=options)
        for x in (slice(0, 11), slice(11, 30))
    )
    assert lse is None
    torch.testing.assert_close(combine(first, second)[0], whole)


# Input that does not fit.

AT = (Span(0, 4),)
BAD_INPUT: list[tuple[dict[str, Any], str]] = [
    (dict(q=(4, 2, 8)), r"must be \[batch, tokens, heads, head_dim\]"),
    (dict(v=(1, 4, 1, 6)), "k like v"),
    (dict(k=(2, 4, 1, 8), v=(2, 4, 1, 8)), "differ in batch or head_dim"),
    (dict(k=(1, 4, 1, 6), v=(1, 4, 1, 6)), "differ in batch or head_dim"),
    (dict(q=(1, 4, 3, 8), k=(1, 4, 2, 8), v=(1, 4, 2, 8)), "3 query heads are not a multiple of 2 kv heads"),
    (dict(k=(1, 4, 0, 8), v=(1, 4, 0, 8)), "2 query heads are not a multiple of 0 kv heads"),
    (dict(q=(1, 4, 2, 0), k=(1, 4, 1, 0), v=(1, 4, 1, 0)), "head_dim is 0; it must be at least 1"),
    (dict(q=(1, 5, 2, 8)), "at_q places 4 tokens, but the tensor holds 5"),
    (dict(k=(1, 6, 1, 8), v=(1, 6, 1, 8)), "at_k places 4 tokens, but the tensor holds 6"),
]


@pytest.mark.parametrize(("shapes", "message"), BAD_INPUT)
def test_shapes_that_do_not_fit_are_refused(shapes: dict[str, Any], message: str) -> None:
    q, k, v = (torch.zeros(shapes.get(name, (1, 4, 2 if name == "q" else 1, 8))) for name in "qkv")
    with pytest.raises(ValueError, match=message):
        attention(q, k, v, Causal(), AT, AT)


@pytest.mark.parametrize(
    ("mask", "at_q", "message"),
    [
        (None, AT, "mask is None; it must be a mask, such as"),
        (Causal(), list(AT), "at_q is a list; it must be a tuple of Span"),
        (Causal(), torch.arange(4), "at_q is a Tensor; it must be a tuple of Span, not positions"),
        (Causal(), (0, 1, 2, 3), "at_q is a tuple; it must be a tuple of Span, not positions"),
    ],
)
def test_what_is_no_mask_or_span_is_refused(mask: Any, at_q: Any, message: str) -> None:
    q = torch.zeros(1, 4, 1, 8)
    with pytest.raises(ValueError, match=message):
        attention(q, q, q, mask, at_q, AT)


def test_dtypes_and_rows_that_do_not_fit_are_refused() -> None:
    q = torch.zeros(3, 4, 1, 8)
    with pytest.raises(ValueError, match=r"share a floating dtype, got torch.float32, torch.float64"):
        attention(q, q.double(), q, Causal(), AT, AT)
    with pytest.raises(ValueError, match="share a floating dtype, got torch.int64"):
        attention(q.long(), q.long(), q.long(), Causal(), AT, AT)
    with pytest.raises(ValueError, match="documents for 2 rows, but the batch has 3"):
        attention(q, q, q, Documents(((0, 2), (0, 3))), AT, AT)
    with pytest.raises(ValueError, match="bound to 2 kv heads, but k has 1"):
        attention(q, q, q, Causal().heads([0, 1], 2), AT, AT)


def test_sigmoid_asked_for_an_lse_is_refused() -> None:
    q, sigmoid = torch.zeros(1, 4, 1, 8), AttentionOptions(normalizer="sigmoid")
    out, none = forward(q, q, q, Causal(), AT, AT, options=sigmoid)
    assert none is None
    with pytest.raises(Unsupported, match="merge needs the lse of both, got None; sigmoid has none"):
        merge((out, none), (out, none))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="lse is Tensor, but the sigmoid backward has none"):
        backward(q, None, q, q, q, q[..., 0, 0], Causal(), AT, AT, options=sigmoid)
    with pytest.raises(ValueError, match="lse is NoneType, but the softmax backward needs it"):
        backward(q, None, q, q, q, None, Causal(), AT, AT)


def test_a_raw_backward_of_other_rows_is_refused() -> None:
    q, k, rows = torch.zeros(2, 4, 2, 8), torch.zeros(2, 4, 1, 8), torch.zeros(2, 2, 4)
    bad: list[tuple[str, Tensor, str]] = [
        ("dout", torch.zeros(2, 4, 1, 8), r"dout is torch.float32 \(2, 4, 1, 8\); .* as q: \(2, 4, 2, 8\)"),
        ("dout", torch.zeros(2, 4, 2, 8).long(), "dout is torch.int64"),
        ("lse", rows.mT, r"lse is torch.float32 \(2, 4, 2\); .* \[batch, heads, tokens\]: \(2, 2, 4\)"),
        ("delta", rows[:1], r"delta is torch.float32 \(1, 2, 4\)"),
        ("delta", rows.long(), "delta is torch.int64"),
    ]
    for name, wrong, words in bad:
        given = {"dout": q, "delta": rows, "lse": rows, name: wrong}
        with pytest.raises(ValueError, match=words):
            backward(given["dout"], given["delta"], q, k, k, given["lse"], Causal(), AT, AT)


@both_backends
def test_a_second_derivative_is_refused(backend: Which) -> None:
    """It would leave out how the gradients depend on q, k and v."""
    q, k, v = (x.requires_grad_() for x in inputs(8, 8)[:3])
    at = (Span(0, 8),)
    out, _ = attention(q, k, v, Causal(), at, at, backend=backend)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dq.sum().backward()


BAD_OPTIONS: list[tuple[dict[str, Any], str]] = [
    (dict(normalizer="relu"), "normalizer is 'relu'; allowed: softmax, sigmoid"),
    (dict(softcap=math.nan), "softcap is nan; it must be a finite number"),
    (dict(softcap=math.inf), "softcap is inf; it must be a finite number"),
    (dict(scale=-math.inf), "scale is -inf; it must be a finite number"),
    (dict(scale=math.nan), "scale is nan; it must be a finite number"),
    (dict(scale=True), "scale is True; it must be a finite number"),
    (dict(softcap=None), "softcap is None; it must be a finite number"),
    (dict(softcap=-1.0), "softcap is -1.0; it must be at least 0"),
    (dict(bias=-3.0), "bias is -3.0; only normalizer='sigmoid' has one"),
]


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        AttentionOptions(**options)
