"""Linear layer and cross entropy in one: the loss of [N, D] activations, never holding [N, V] logits."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .fused_loss import by_liger, by_torch, liger_refusal, torch_refusal
from .mask import Unsupported
from .shapes import without_data

Backend = Literal["auto", "own", "torch", "liger"]


@dataclass(frozen=True)
class Rows:
    """Which rows of the weight are here, where several ranks hold it together: those from `first` on, `of`
    all of them.

    largest, total: the greatest and the sum over these ranks, element by element, in the place of a tensor
    that is given; every rank has the same tokens and calls them in the same order.
    """

    first: int
    of: int
    largest: Callable[[Tensor], Tensor]
    total: Callable[[Tensor], Tensor]


class _Terms(NamedTuple):
    chunk: int
    ignore_index: int
    z_loss: float
    grad: bool  # whether autograd records: else the gradients are not computed
    rows: Rows | None


def linear_cross_entropy(
    x: Tensor, weight: Tensor, labels: Tensor, *,
    denominator: Tensor | float, chunk: int = 4096, ignore_index: int = -100, z_loss: float = 0.0,
    backend: Backend = "auto", rows: Rows | None = None,
) -> Tensor:  # fmt: skip
    """Sum over valid tokens of (cross entropy + z_loss * lse^2) / denominator: float32 (float64 for float64).

    x [N, D], weight [V, D], labels int64 [N]; a token is valid unless its label is `ignore_index`.
    denominator: the *global* number of valid tokens, so that the losses of all ranks add up to the mean; 0
    counts as 1. chunk: tokens whose logits are held at once. The gradients are made in the forward pass, that
    of `weight` summed in float32. Under autocast the matmuls run in its dtype, the softmax in float32.
    z-loss: PaLM (Chowdhery et al. 2022), section 5. backend: see `chosen`. rows: of the weight that is held
    here, where ranks share the vocabulary (Shoeybi et al. 2019, section 3): the loss is whole on each, the
    gradient of x an addend. ValueError for shapes, dtypes and labels that do not fit, Unsupported for what a
    forced backend cannot do.
    """
    _check(x, weight, labels, chunk, ignore_index, rows)
    _check_terms(denominator, z_loss)
    name = chosen(x, weight, z_loss=z_loss, backend=backend, rows=rows)
    if name == "liger":
        whole = by_liger(x, weight, labels, ignore_index=ignore_index, z_loss=z_loss)
    elif name == "torch":
        whole = by_torch(x, weight, labels, ignore_index=ignore_index, chunk=chunk)
    else:
        terms = _Terms(chunk, ignore_index, z_loss, torch.is_grad_enabled(), rows)
        whole = _LinearCrossEntropy.apply(x, weight, labels, terms)
    share = torch.as_tensor(denominator, dtype=whole.dtype, device=whole.device)
    return whole / share.masked_fill(share == 0, 1.0)


def chosen(
    x: Tensor, weight: Tensor, *, z_loss: float = 0.0, backend: Backend = "auto", rows: Rows | None = None
) -> str:
    """The backend that will run: of 'liger' (liger-kernel's on CUDA, in half precision too), 'torch' (torch's
    operator, float32 and float64 without z-loss) and 'own' the first that serves this, or the forced one;
    rows of a weight are served by 'own' alone. Unsupported, saying why, if the forced one does not.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(get_args(Backend))}")
    refusals = {"liger": liger_refusal(x, weight)} if backend in ("auto", "liger") else {}
    if backend in ("auto", "torch"):
        refusals["torch"] = torch_refusal(x, weight, z_loss)
    if rows is not None:
        refusals = {name: "ranks hold the weight together" for name in refusals}
    if backend == "auto":
        return next((name for name, reason in refusals.items() if reason is None), "own")
    reason = refusals.get(backend)
    if reason:
        raise Unsupported(f"backend={backend!r}: {reason} (backend='own' takes all)")
    return backend


@torch.no_grad()
def token_losses(
    x: Tensor, weight: Tensor, labels: Tensor, *,
    chunk: int = 4096, ignore_index: int = -100, rows: Rows | None = None,
) -> Tensor:  # fmt: skip
    """Cross entropy of each token, 0 where ignored: float32 [N] (float64 for float64), not differentiable."""
    _check(x, weight, labels, chunk, ignore_index, rows)
    losses = torch.zeros(len(x), dtype=torch.promote_types(x.dtype, torch.float32), device=x.device)
    for at in _chunks(len(x), chunk):
        part = _logits(x[at], weight, labels[at], ignore_index, rows)
        lse, chosen = _normalized(part, rows)
        losses[at] = (lse - chosen).masked_fill(~part.valid, 0.0)
    return losses


@torch.no_grad()
def likeliest(x: Tensor, weight: Tensor, *, rows: Rows | None = None) -> Tensor:
    """The row of the weight [V, D] that gives each of x [N, D] its greatest logit: int64 [N]."""
    best, at = (x @ weight.mT).max(-1)
    if rows is None:
        return at
    top = rows.largest(best.clone())
    # of rows that are equal the first, whoever holds it
    return -rows.largest(-(at + rows.first).where(best == top, rows.of))


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, terms: _Terms) -> Tensor:
        wants_x, wants_weight = (terms.grad and wanted for wanted in ctx.needs_input_grad[:2])
        dtype = torch.promote_types(x.dtype, torch.float32)
        dx = torch.empty_like(x) if wants_x else None
        dw = torch.zeros(weight.shape, dtype=dtype, device=x.device) if wants_weight else None
        whole = torch.zeros((), dtype=dtype, device=x.device)
        for at in _chunks(len(x), terms.chunk):
            part = _logits(x[at], weight, labels[at], terms.ignore_index, terms.rows)
            lse, chosen = _normalized(part, terms.rows)
            loss = lse - chosen + terms.z_loss * lse**2
            whole += loss.masked_fill(~part.valid, 0.0).sum()
            if dx is None and dw is None:
                continue
            slope = _slope(part, lse, terms.z_loss).to(x.dtype)
            if dx is not None:
                dx[at] = slope @ weight
            if dw is not None:
                dw += slope.mT @ x[at]
        ctx.save_for_backward(dx, dw)
        ctx.weight_dtype = weight.dtype
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = ctx.saved_tensors
        dx = None if dx is None else (dx * grad).to(dx.dtype)
        dw = None if dw is None else (dw * grad).to(ctx.weight_dtype)
        return dx, dw, None, None


def _chunks(tokens: int, chunk: int) -> Iterator[slice]:
    return (slice(i, i + chunk) for i in range(0, tokens, chunk))


class _Logits(NamedTuple):
    """Of a chunk: logits [n, V] in the partial dtype, valid tokens [n], labels [n, 1] to gather with, and
    where these are rows that are here, bool [n, 1]; None: everywhere.
    """

    logits: Tensor
    valid: Tensor
    label: Tensor
    mine: Tensor | None


def _logits(x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, rows: Rows | None) -> _Logits:
    logits = (x @ weight.mT).to(torch.promote_types(x.dtype, torch.float32))
    valid = labels != ignore_index
    label, mine = labels.where(valid, 0)[:, None], None
    if rows is not None:
        label = label - rows.first
        mine = (label >= 0) & (label < len(weight))
        label = label.where(mine, 0)
    return _Logits(logits, valid, label, mine)


def _normalized(part: _Logits, rows: Rows | None) -> tuple[Tensor, Tensor]:
    """The log-sum-exp of all logits, and the logit of the label: [n] each."""
    lse, chosen = part.logits.logsumexp(-1), part.logits.gather(1, part.label)[:, 0]
    if rows is None or part.mine is None:
        return lse, chosen
    top = rows.largest(lse.clone())
    terms = rows.total(torch.stack(((lse - top).exp(), chosen.masked_fill(~part.mine[:, 0], 0.0))))
    return top + terms[0].log(), terms[1]


def _slope(part: _Logits, lse: Tensor, z_loss: float) -> Tensor:
    """Gradient of the summed loss with respect to the logits, whose memory it takes."""
    slope = part.logits.sub_(lse[:, None]).exp_()
    if z_loss:
        slope.mul_(1 + 2 * z_loss * lse[:, None])
    ones = torch.ones_like(part.label, dtype=slope.dtype) if part.mine is None else part.mine.to(slope.dtype)
    slope.scatter_add_(1, part.label, -ones)
    return slope.masked_fill_(~part.valid[:, None], 0.0)


def _check(
    x: Tensor, weight: Tensor, labels: Tensor, chunk: int, ignore_index: int, rows: Rows | None
) -> None:
    if x.ndim != 2 or weight.ndim != 2 or x.shape[1] != weight.shape[1] or labels.shape != x.shape[:1]:
        shapes = [tuple(t.shape) for t in (x, weight, labels)]
        raise ValueError(f"x [N, D], weight [V, D] and labels [N] do not fit each other: {shapes}")
    if not x.is_floating_point() or not weight.is_floating_point():
        raise ValueError(f"x is {x.dtype}, weight {weight.dtype}; both must be floating")
    if labels.dtype != torch.int64:
        raise ValueError(f"labels are {labels.dtype}; they must be torch.int64")
    if not isinstance(chunk, int) or chunk < 1:
        raise ValueError(f"chunk is {chunk}; it must be a whole number of tokens, at least 1")
    # not on a GPU, where looking at the values would wait for it
    if labels.device.type == "cpu" and labels.numel() and not without_data(labels):
        used = labels[labels != ignore_index]
        count = len(weight) if rows is None else rows.of
        bad = used[(used < 0) | (used >= count)]
        if bad.numel():
            raise ValueError(
                f"label {int(bad[0])} is neither a row of weight (0 to {count - 1}) nor {ignore_index}"
            )


def _check_terms(denominator: Tensor | float, z_loss: float) -> None:
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss is {z_loss}; it must be a number of at least 0")
    if isinstance(denominator, Tensor):
        if denominator.numel() != 1:
            raise ValueError(f"denominator has shape {tuple(denominator.shape)}; it must be one number")
    elif denominator < 0:
        raise ValueError(f"denominator is {denominator}; it must be a number of at least 0")
