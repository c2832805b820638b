"""torch's operators as a backend: what they are offered, and how they are called. Their numbers need a GPU:
tests/test_gpu.py.
"""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from longspan.kernels import sdpa
from longspan.kernels.attention import backward, chosen, forward, row_delta
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, First, Full, Mask, Unsupported, Window
from longspan.kernels.options import AttentionOptions
from longspan.kernels.span import Span, Spans, total
from oracle import distance, inputs

LINE = (Span(0, 16),)
SPLIT = (Span(0, 7), Span(7, 0), Span(7, 9))
LATER = (Span(16, 16),)
STRIPED = (Span(0, 16, 1, 2),)
ZIGZAG = (Span(0, 8), Span(24, 8))


@pytest.mark.parametrize(
    ("mask", "at_q", "at_k", "flag"),
    [
        (Full(), ZIGZAG, STRIPED, False),
        (Causal(), LINE, LINE, True),
        (Causal(), LATER, LATER, True),
        (Causal(), SPLIT, SPLIT, True),
        (Causal(), LATER, LINE, False),
        (Causal(), LATER, ZIGZAG[:1], False),
        (Causal(), (Span(15, 1),), LINE, False),
        (Causal().heads((1, 0), 2), LINE, LINE, True),
        (Causal(), LINE, LATER, None),
        (Causal(), ZIGZAG, ZIGZAG, None),
        (Causal(), STRIPED, STRIPED, None),
        (Causal(), LATER, (Span(8, 16),), None),
        (Causal() & Full(), LINE, LINE, None),
        (Window(None), LINE, LINE, None),
    ],
)
def test_the_causal_flag_says_the_mask(mask: Mask, at_q: Spans, at_k: Spans, flag: bool | None) -> None:
    assert sdpa.causal_flag(mask, at_q, at_k) is flag
    if flag is not None:
        shape = total(at_q), total(at_k)
        seen = visible(lower(mask, at_q, at_k, 2, torch.device("cpu"))).expand(1, 2, *shape)[0, 0]
        assert torch.equal(
            seen, torch.ones(shape, dtype=torch.bool).tril() if flag else torch.ones(shape) > 0
        )


@pytest.mark.parametrize(
    ("words", "dtype", "head_dim", "mask", "options"),
    [
        ("the mask is First", torch.bfloat16, 64, First(3), AttentionOptions()),
        ("Causal where queries and keys are the same run", torch.float16, 64, Window(5), AttentionOptions()),
        ("the scores are softmax with softcap 5", torch.bfloat16, 64, Full(), AttentionOptions(softcap=5.0)),
        ("the scores are sigmoid", torch.bfloat16, 64, Full(), AttentionOptions(normalizer="sigmoid")),
        ("scale is -0.5; it takes scales above 0", torch.bfloat16, 64, Full(), AttentionOptions(scale=-0.5)),
        ("q is torch.float32; it takes bfloat16", torch.float32, 64, Full(), AttentionOptions()),
        ("head_dim 36; it takes multiples of 8", torch.bfloat16, 36, Full(), AttentionOptions()),
        ("head_dim 264; it takes multiples of 8 up to 256", torch.bfloat16, 264, Full(), AttentionOptions()),
        ("q is on cpu; it needs a CUDA device", torch.bfloat16, 64, Causal(), AttentionOptions()),
    ],
)
def test_it_refuses_what_torch_cannot_do(
    words: str, dtype: torch.dtype, head_dim: int, mask: Mask, options: AttentionOptions
) -> None:
    q = torch.zeros(1, 16, 2, head_dim, dtype=dtype)
    assert not sdpa.supports(q, mask, LINE, LINE, options)
    ends: Any = (None, None) if options.normalizer == "sigmoid" else (torch.zeros(1, 2, 16),) * 2
    with pytest.raises(Unsupported, match=rf"backend='sdpa'.*{words}.*backend='triton'"):
        forward(q, q, q, mask, LINE, LINE, options=options, backend="sdpa")
    with pytest.raises(Unsupported, match=words):
        backward(q, ends[0], q, q, q, ends[1], mask, LINE, LINE, options=options, backend="sdpa")


@pytest.mark.parametrize(
    ("capability", "head_dim", "refused", "operator"),
    [
        ((7, 5), 64, "compute capability (7, 5)", "flash"),
        ((8, 6), 256, "head_dim 256; on compute capability (8, 6) it takes up to 192", "flash"),
        ((8, 0), 256, None, "flash"),
        ((9, 0), 256, None, "flash"),
        ((12, 0), 128, None, "flash"),
    ],
)
def test_devices_differ(
    monkeypatch: pytest.MonkeyPatch, capability: Any, head_dim: int, refused: str | None, operator: str
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    with FakeTensorMode():
        q = torch.empty(1, 16, 2, head_dim, dtype=torch.bfloat16, device="cuda")
    assert sdpa.supports(q, Full(), LINE, LINE, AttentionOptions()) is (refused is None)
    assert sdpa.preferred(q) == operator
    if refused:
        rest: Any = Full(), None, LINE, LINE, AttentionOptions()
        with pytest.raises(Unsupported) as error:
            sdpa.forward(q, q, q, *rest)
        assert refused in str(error.value)


def test_nothing_chooses_it_unasked() -> None:
    q = torch.zeros(1, 16, 2, 64, dtype=torch.bfloat16)
    assert chosen(q) == "cpu" and chosen(q, backend="sdpa") == "sdpa"
    with pytest.raises(ValueError, match="allowed: auto, reference, cpu, triton, sdpa"):
        chosen(q, backend="cudnn")  # type: ignore[arg-type]


@pytest.mark.parametrize("operator", ["flash", "cudnn"])
def test_the_operators_take_what_they_are_given(operator: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As far as torch knows without a device: the arguments, and the shapes and dtypes of what comes back."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    lost = SimpleNamespace(any=lambda: False)
    monkeypatch.setattr(sdpa, "stand_in", lambda dout, delta: (torch.empty_like(dout), lost))
    with FakeTensorMode():
        q, k = (torch.empty(2, n, h, 72, dtype=torch.bfloat16, device="cuda") for n, h in ((40, 8), (24, 2)))
        rest: Any = Causal(), None, (Span(24, 40),), (Span(0, 24),), AttentionOptions(), operator
        out, lse = sdpa.forward(q, k, k, *rest)
        assert (out.shape, lse.shape) == ((2, 40, 8, 72), (2, 8, 40))
        grads = sdpa.backward(torch.empty_like(out), lse, q, k, k, lse, *rest)
    assert [x.shape for x in grads] == [q.shape, k.shape, k.shape]
    assert {x.dtype for x in (out, lse, *grads)} == {torch.float32}


def gradients_by_cpu_operator(given: tuple[Tensor, ...], out: Tensor, lse: Tensor) -> list[Tensor]:
    """torch's operator for the CPU makes delta of `out` like those on CUDA."""
    q, k, v, dout = (x.transpose(1, 2) for x in given)
    run = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    grads = run(dout, q, k, v, out.transpose(1, 2), lse, 0.0, True, attn_mask=None, scale=q.shape[3] ** -0.5)
    return [x.transpose(1, 2) for x in grads]


def test_the_stand_in_leads_to_the_gradients_of_any_delta() -> None:
    """Also where rows have tiny gradients, where delta is 0, and of a delta that no `out` has."""
    q, k, v, dout, dlse = inputs(16, 16, (2, 2), dim=8, dtype=torch.float32)
    dout[:, 3] *= 1e-25
    dout[:, 5] = 0
    out, lse = forward(q, k, v, Causal(), LINE, LINE, backend="reference")
    assert lse is not None
    dlse[..., 3] *= 1e-25
    dlse[..., 5] = 0
    delta = row_delta(dout, out, lse, 3 * dlse)
    assert delta is not None
    found, lost = sdpa.stand_in(dout, delta)
    assert not lost.any()
    assert distance((found * dout).sum(-1).transpose(1, 2), delta) < 1e-6
    want = backward(dout, delta, q, k, v, lse, Causal(), LINE, LINE, backend="reference")
    for a, b in zip(gradients_by_cpu_operator((q, k, v, dout), found, lse), want, strict=True):
        assert distance(a, b) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_stand_in_of_half_precision_is_as_good_as_its_digits(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    dout = torch.randn(2, 50, 4, 64, generator=generator).to(dtype)
    delta = torch.randn(2, 4, 50, generator=generator)
    out, lost = sdpa.stand_in(dout, delta)
    assert out.dtype == dtype and out.shape == dout.shape and not lost.any()
    reached = (out.double() * dout.double()).sum(-1).transpose(1, 2)
    assert distance(reached, delta) < torch.finfo(dtype).eps / 8


def test_rows_without_a_stand_in_are_named() -> None:
    """No dout, or one so small that no number of the dtype leads to delta."""
    dout = torch.ones(1, 4, 2, 8, dtype=torch.float16)
    dout[0, 1, 0] = 0
    dout[0, 2, 1] = 6e-8
    delta = torch.full((1, 2, 4), 3.0)
    delta[0, 0, 3] = 0
    assert sdpa.stand_in(dout, delta)[1].nonzero().tolist() == [[0, 1, 0], [0, 2, 1]]
    delta[0, 0, 1] = delta[0, 1, 2] = 0
    out, lost = sdpa.stand_in(dout, delta)
    assert not lost.any() and not out[0, 1, 0].any()
