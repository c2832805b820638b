"""The chunked loss: the naive one in value and gradients, for any chunk, and nothing where nothing counts."""

import math
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from longspan.kernels import fused_loss
from longspan.kernels.loss import Backend, chosen, linear_cross_entropy, token_losses
from longspan.kernels.mask import Unsupported

N, D, V = 37, 12, 50
on_each = pytest.mark.parametrize(
    "backend",
    [
        "own",
        pytest.param(
            "torch", marks=pytest.mark.skipif(not hasattr(F, "linear_cross_entropy"), reason="2.13")
        ),
    ],
)


def inputs(
    dtype: torch.dtype = torch.float64, tokens: int = N, ignored: float = 0.3
) -> tuple[Tensor, Tensor, Tensor]:
    """x, weight, labels."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(tokens, D, generator=generator, dtype=torch.float64).to(dtype)
    weight = torch.randn(V, D, generator=generator, dtype=torch.float64).to(dtype)
    labels = torch.randint(V, (tokens,), generator=generator)
    labels[torch.rand(tokens, generator=generator) < ignored] = -100
    return x, weight, labels


def naive(x: Tensor, weight: Tensor, labels: Tensor, denominator: float, z_loss: float) -> Tensor:
    logits = x @ weight.mT
    valid = labels != -100
    entropy = F.cross_entropy(logits, labels, reduction="none", ignore_index=-100)
    return (entropy + z_loss * logits.logsumexp(-1).square() * valid).sum() / denominator


def with_gradients(loss: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor) -> list[Tensor]:
    x, weight = (t.clone().requires_grad_() for t in (x, weight))
    value = loss(x, weight)
    return [value.detach(), *torch.autograd.grad(value, (x, weight))]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@on_each
@pytest.mark.parametrize("z_loss", [0.0, 0.01])
@pytest.mark.parametrize("chunk", [1, 8, 36, 37, 4096])
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float64, 1e-12), (torch.float32, 2e-6)])
def test_it_is_the_naive_loss(
    dtype: torch.dtype, limit: float, chunk: int, z_loss: float, backend: Backend
) -> None:
    x, weight, labels = inputs(dtype)
    backend = "auto" if z_loss else backend

    def ours(x: Tensor, weight: Tensor) -> Tensor:
        return linear_cross_entropy(
            x, weight, labels, denominator=41.0, chunk=chunk, z_loss=z_loss, backend=backend
        )

    found = with_gradients(ours, x, weight)
    right = with_gradients(lambda x, w: naive(x, w, labels, 41.0, z_loss), x.double(), weight.double())
    assert all(a.dtype == dtype and distance(a, b) < limit for a, b in zip(found, right, strict=True))


def test_each_token_has_its_own_loss() -> None:
    x, weight, labels = inputs()
    right = F.cross_entropy(x @ weight.mT, labels, reduction="none")
    for chunk in (5, 100):
        losses = token_losses(x.clone().requires_grad_(), weight, labels, chunk=chunk)
        assert not losses.requires_grad
        torch.testing.assert_close(losses, right, rtol=1e-12, atol=1e-12)
    single = token_losses(x.float(), weight.float(), labels)
    assert single.dtype == torch.float32 and distance(single, right) < 1e-6
    assert not single[labels == -100].any()


@on_each
def test_losses_of_shards_add_up_to_the_mean_of_all_valid_tokens(backend: Backend) -> None:
    """The denominator is the global count, a number or a tensor; shards differ in valid tokens."""
    x, weight, labels = inputs()
    valid = (labels != -100).sum()
    whole = F.cross_entropy(x @ weight.mT, labels)
    for denominator in (valid, float(valid)):
        parts = [
            linear_cross_entropy(x[p], weight, labels[p], denominator=denominator, chunk=4, backend=backend)
            for p in (slice(0, 3), slice(3, 20), slice(20, N))
        ]
        torch.testing.assert_close(sum(parts), whole, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("tokens", [0, N], ids=["no token", "all ignored"])
@pytest.mark.parametrize("denominator", [0.0, 7.0])
def test_no_valid_token_is_no_loss_and_no_gradient(tokens: int, denominator: float) -> None:
    x, weight, labels = inputs(torch.float32, tokens, ignored=1.1)
    for given in (denominator, torch.tensor(denominator), torch.tensor(int(denominator))):
        found = with_gradients(
            lambda x, w, d=given: linear_cross_entropy(x, w, labels, denominator=d, chunk=16, z_loss=0.1),  # type: ignore[misc]
            x,
            weight,
        )
        assert all(not t.any() for t in found)
        assert [t.shape for t in found] == [(), x.shape, weight.shape]
    assert not token_losses(x, weight, labels).any()


@on_each
def test_another_ignore_index(backend: Backend) -> None:
    x, weight, labels = inputs()
    moved = labels.where(labels != -100, 3)
    keep = moved != 3
    right = F.cross_entropy((x @ weight.mT)[keep], moved[keep], reduction="sum")
    found = linear_cross_entropy(x, weight, moved, denominator=1.0, ignore_index=3, backend=backend)
    torch.testing.assert_close(found, right)
    torch.testing.assert_close(token_losses(x, weight, moved, ignore_index=3).sum(), right)


@on_each
def test_only_the_gradients_that_are_wanted(backend: Backend) -> None:
    x, weight, labels = inputs()
    right = with_gradients(lambda x, w: naive(x, w, labels, 1.0, 0.0), x, weight)
    for wanted in (0, 1):
        leaves = x.clone(), weight.clone()
        leaves[wanted].requires_grad_()
        linear_cross_entropy(*leaves, labels, denominator=1.0, chunk=10, backend=backend).backward()
        grad = leaves[wanted].grad
        assert grad is not None and leaves[1 - wanted].grad is None
        torch.testing.assert_close(grad, right[1 + wanted], rtol=1e-12, atol=1e-12)
    with torch.no_grad():
        loss = linear_cross_entropy(x.requires_grad_(), weight, labels, denominator=1.0, backend=backend)
    assert not loss.requires_grad


@on_each
def test_backward_may_run_twice_and_scales_with_what_comes_in(backend: Backend) -> None:
    x, weight, labels = inputs()
    x.requires_grad_()
    loss = linear_cross_entropy(x, weight, labels, denominator=5.0, backend=backend)
    once = torch.autograd.grad(loss, x, retain_graph=True)[0]
    again = torch.autograd.grad(loss, x, torch.tensor(3.0, dtype=torch.float64))[0]
    torch.testing.assert_close(again, 3 * once)


def test_half_precision_keeps_its_dtype_and_the_softmax_float32() -> None:
    x, weight, labels = inputs(torch.bfloat16)
    exact = with_gradients(lambda x, w: naive(x, w, labels, 9.0, 0.0), x.double(), weight.double())
    found = with_gradients(lambda x, w: linear_cross_entropy(x, w, labels, denominator=9.0), x, weight)
    assert [t.dtype for t in found] == [torch.float32, torch.bfloat16, torch.bfloat16]
    # the logits are rounded to bfloat16, as by torch's own layer
    assert all(distance(a, b) < 1e-2 for a, b in zip(found, exact, strict=True))


def test_the_gradient_of_the_weight_does_not_wear_off_over_chunks() -> None:
    """Summed in bfloat16, the last of 256 like chunks would no longer count."""
    x = torch.ones(4096, D, dtype=torch.bfloat16)
    weight, labels = (
        torch.zeros(V, D, dtype=torch.bfloat16, requires_grad=True),
        torch.zeros(4096, dtype=torch.int64),
    )
    linear_cross_entropy(x, weight, labels, denominator=4096.0, chunk=16).backward()
    assert weight.grad is not None
    expected = torch.full((V, D), 1 / V)
    expected[0] -= 1
    assert distance(weight.grad, expected) < 4e-3


def test_under_autocast_the_matmul_is_bfloat16_and_the_loss_float32() -> None:
    x, weight, labels = inputs(torch.float32)

    def torchs(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight)
        assert logits.dtype == torch.bfloat16
        return F.cross_entropy(logits.float(), labels)

    valid = float((labels != -100).sum())
    with torch.autocast("cpu", torch.bfloat16):
        right = with_gradients(torchs, x, weight)
        found = with_gradients(lambda x, w: linear_cross_entropy(x, w, labels, denominator=valid), x, weight)
    assert all(t.dtype == torch.float32 for t in found)
    torch.testing.assert_close(found[0], right[0], rtol=1e-6, atol=0)
    # both round the slope of the logits to bfloat16, one before and one after the division by the count
    assert all(distance(a, b) < 1e-2 for a, b in zip(found[1:], right[1:], strict=True))


def test_it_never_holds_all_logits() -> None:
    """The largest tensor that an operator makes in either pass is far below [N, V]."""
    sizes: list[int] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            result = func(*args, **(kwargs or {}))
            sizes.extend(
                t.numel()
                for t in (result if isinstance(result, tuple) else (result,))
                if isinstance(t, Tensor)
            )
            return result

    x, weight, labels = inputs(torch.float32, tokens=1000)
    x, weight = x.requires_grad_(), weight.requires_grad_()
    with Watch():
        linear_cross_entropy(x, weight, labels, denominator=1.0, chunk=100, backend="own").backward()
    assert max(sizes) == x.numel() and x.numel() < 1000 * V / 4


BAD: list[tuple[Callable[[Tensor, Tensor, Tensor], Tensor], str]] = [
    (
        lambda x, w, y: linear_cross_entropy(x, w[:, 1:], y, denominator=1.0),
        r"do not fit each other: .*\(50, 11\)",
    ),
    (lambda x, w, y: linear_cross_entropy(x, w, y[1:], denominator=1.0), r"do not fit each other: .*\(36,\)"),
    (lambda x, w, y: linear_cross_entropy(x[None], w, y, denominator=1.0), r"x \[N, D\]"),
    (lambda x, w, y: linear_cross_entropy(x, w, y.int(), denominator=1.0), "labels are torch.int32"),
    (
        lambda x, w, y: linear_cross_entropy(x, w, y, denominator=1.0, chunk=0),
        "chunk is 0; it must be a whole number of tokens, at least 1",
    ),
    (
        lambda x, w, y: linear_cross_entropy(x, w, y + V, denominator=1.0),
        r"is neither a row of weight \(0 to 49\)",
    ),
    (lambda x, w, y: linear_cross_entropy(x.long(), w, y, denominator=1.0), "x is torch.int64, weight"),
    (lambda x, w, y: linear_cross_entropy(x, w, y, denominator=-1.0), "denominator is -1.0; it must be"),
    (
        lambda x, w, y: linear_cross_entropy(x, w, y, denominator=torch.ones(2)),
        r"denominator has shape \(2,\)",
    ),
    (lambda x, w, y: linear_cross_entropy(x, w, y, denominator=1.0, z_loss=math.nan), "z_loss is nan"),
    (lambda x, w, y: token_losses(x, w, y.where(y != -100, -1)), r"label -1 is neither .* nor -100"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_input_that_does_not_fit_is_refused(
    call: Callable[[Tensor, Tensor, Tensor], Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        call(*inputs())


def test_auto_takes_what_keeps_the_contract() -> None:
    """torch's operator has no z-loss, and would round the loss of bfloat16 to bfloat16."""
    x, weight, _ = inputs(torch.float32)
    has_operator = hasattr(F, "linear_cross_entropy")
    assert chosen(x, weight) == ("torch" if has_operator else "own")
    assert chosen(x, weight, backend="own") == "own" == chosen(x, weight, z_loss=1e-4)
    assert chosen(x.bfloat16(), weight.bfloat16()) == "own" == chosen(x[:0], weight)
    with torch.autocast("cpu", torch.bfloat16):
        assert chosen(x, weight) == "own"


def test_a_backend_that_cannot_says_why() -> None:
    x, weight, labels = inputs(torch.float32)

    def ask(backend: Any, x: Tensor = x, z_loss: float = 0.0) -> None:
        linear_cross_entropy(x, weight, labels, denominator=1.0, z_loss=z_loss, backend=backend)

    with pytest.raises(ValueError, match="backend is 'trition'; allowed: auto, own, torch, liger"):
        ask("trition")
    with pytest.raises(Unsupported, match="backend='liger': x is on cpu; it needs a CUDA device"):
        ask("liger")
    if hasattr(F, "linear_cross_entropy"):
        with pytest.raises(Unsupported, match="backend='torch': z_loss is 0.1; it has none .backend='own'"):
            ask("torch", z_loss=0.1)
        with pytest.raises(Unsupported, match="x is torch.float64 and weight torch.float32; it takes"):
            ask("torch", x.double())


def test_without_torchs_operator_or_liger_auto_is_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(F, "linear_cross_entropy", None, raising=False)
    x, weight, _ = inputs()
    assert chosen(x, weight) == "own"
    with pytest.raises(Unsupported, match="has no linear_cross_entropy with chunks"):
        chosen(x, weight, backend="torch")
    monkeypatch.setitem(sys.modules, "liger_kernel.ops.fused_linear_cross_entropy", None)
    assert fused_loss._liger.__wrapped__() is None


def liger_equals_own(device: str, dtype: torch.dtype) -> None:
    """In value and gradients, twice over, with and without z-loss."""
    limit = 1e-5 if dtype == torch.float32 else 2e-2
    x, weight, labels = (t.to(device) for t in inputs(dtype))
    x, weight = x.requires_grad_(), weight.requires_grad_()
    for z_loss in (0.0, 0.01):
        loss = fused_loss.by_liger(x, weight, labels, ignore_index=-100, z_loss=z_loss) / 41
        own = linear_cross_entropy(x, weight, labels, denominator=41.0, z_loss=z_loss, backend="own")
        first = torch.autograd.grad(loss, (x, weight), retain_graph=True)
        again = torch.autograd.grad(loss, (x, weight))
        right = torch.autograd.grad(own, (x, weight))
        assert distance(loss.detach(), own.detach()) < limit and loss.dtype == torch.float32
        assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
        assert all(distance(a, b) < limit and a.dtype == dtype for a, b in zip(first, right, strict=True))


@pytest.mark.slow
def test_interpreted_liger_equals_own() -> None:
    pytest.importorskip("liger_kernel")
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_liger_equals_own_on_a_gpu(dtype: torch.dtype) -> None:
    pytest.importorskip("liger_kernel")
    x, weight, _ = (t.to("cuda") for t in inputs(dtype))
    assert chosen(x.requires_grad_(), weight) == "liger"
    liger_equals_own("cuda", dtype)


if __name__ == "__main__":
    for dtype in (torch.float32, torch.float16):
        liger_equals_own("cpu", dtype)
