"""The door to the kernels: attention over local tokens, its raw halves for rings, merge, and the choice of
backend.
"""

from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import cpu, reference, shapes
from .lower import Lowered, lower
from .mask import Mask, Unsupported
from .options import AttentionOptions
from .selection import Selection, picked
from .span import Span, Spans, total

Backend = Literal["auto", "reference", "cpu", "triton", "sdpa"]
DEFAULT = AttentionOptions()


def chosen(q: Tensor, options: AttentionOptions = DEFAULT, backend: Backend = "auto") -> str:
    """The backend that will run: 'triton' on CUDA, 'cpu' on the CPU, 'reference' where those cannot, or the
    forced one. 'sdpa', torch's own operators on CUDA, only runs where it is forced; 'shapes', which
    computes nothing, where tensors have no data.
    """
    if backend not in get_args(Backend):
        raise ValueError(f"backend is {backend!r}; allowed: {', '.join(get_args(Backend))}")
    if shapes.without_data(q):
        return "shapes"
    if backend != "auto":
        return backend
    if q.device.type == "cuda":
        return "triton" if find_spec("triton") and _module("triton", {}).supports(q) else "reference"
    return "cpu" if cpu.supports(q, options) else "reference"


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, at_q: Spans, at_k: Spans, *,
    options: AttentionOptions = DEFAULT, backend: Backend = "auto", selection: Selection | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Partial result over these keys: out [B, Nq, Hq, D], lse [B, Hq, Nq] (None for sigmoid), float32
    (float64 for float64).

    Not differentiable; a row without a visible key is out = 0, lse = -inf.
    """
    check(q, k, v, mask, at_q, at_k)
    more = _selected(selection, q, k)
    if not total(at_q) or not total(at_k):
        return nothing(q, options)
    name = chosen(q, options, backend)
    if name == "shapes":
        _check_unseen(mask, q, options, backend)
        return shapes.forward(q, options)
    low = lower(mask, at_q, at_k, k.shape[2], q.device)
    _check_batch(low, q)
    if name == "reference":
        return reference.forward(q, k, v, low, options, **more)
    return _module(name, more).forward(q, k, v, mask, low, at_q, at_k, options, **more)


def backward(
    dout: Tensor, delta: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None,
    mask: Mask, at_q: Spans, at_k: Spans, *, options: AttentionOptions = DEFAULT, backend: Backend = "auto",
    selection: Selection | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv over these keys, float32 (float64 for float64); `lse` and `delta` are those of the *whole*
    row.

    delta = rowsum(dout * out) - dlse, [B, Hq, Nq]; both None for sigmoid. Gradients over disjoint keys sum to
    the whole.
    """
    check(q, k, v, mask, at_q, at_k)
    more = _selected(selection, q, k)
    _check_rows(q, dout, {"lse": lse, "delta": delta}, options)
    if not total(at_q) or not total(at_k):
        dtype = partial_dtype(q)
        return tuple(torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))  # type: ignore[return-value]
    name = chosen(q, options, backend)
    if name == "shapes":
        _check_unseen(mask, q, options, backend)
        return shapes.backward(q, k, v)
    low = lower(mask, at_q, at_k, k.shape[2], q.device)
    _check_batch(low, q)
    if name == "reference":
        return reference.backward(dout, delta, q, k, v, lse, low, options, **more)
    run = _module(name, more, back=True).backward
    found: tuple[Tensor, Tensor, Tensor] = run(
        dout, delta, q, k, v, lse, mask, low, at_q, at_k, options, **more
    )
    return found


def _selected(selection: Selection | None, q: Tensor, k: Tensor) -> dict[str, Any]:
    """What the backends are given besides, once it is checked."""
    if selection is None:
        return {}
    selection.check(q, k)
    return {"selection": selection}


def _module(name: str, more: dict[str, Any], *, back: bool = False) -> Any:
    """What has the `forward` of a backend, or its `backward`. What needs Triton is imported only to run."""
    if name == "sdpa" and more:
        raise Unsupported("backend='sdpa' takes no selection of blocks; backend='triton' does")
    if name == "cpu":
        return cpu
    if not find_spec("triton"):
        raise Unsupported(f"backend={name!r} needs Triton, which is not installed; 'reference' does not")
    if name == "sdpa":
        from . import sdpa

        return sdpa
    from . import flash_backward, flash_forward

    return flash_backward if back else flash_forward


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Mask, at: tuple[Spans, Spans],
        options: AttentionOptions, backend: Backend, selection: Selection | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        out, lse = forward(q, k, v, mask, *at, options=options, backend=backend, selection=selection)
        # the blocks too, so that a change of them before the backward is an error
        ctx.save_for_backward(q, k, v, out, lse, selection.chosen if selection else None)
        ctx.rest = mask, at, options, backend, selection
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor, dlse: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, _ = ctx.saved_tensors
        mask, at, options, backend, selection = ctx.rest
        delta = row_delta(dout, out, lse, dlse, backend=backend)
        grads = backward(
            dout, delta, q, k, v, lse, mask, *at, options=options, backend=backend, selection=selection
        )
        rest = None, None, None, None, None
        return *(g.to(x.dtype) for g, x in zip(grads, (q, k, v), strict=True)), *rest


def attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, at_q: Spans, at_k: Spans, *,
    options: AttentionOptions = DEFAULT, backend: Backend = "auto", selection: Selection | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Attention of local queries over local keys: the partial (out, lse) of `forward`, both differentiable.

    q [B, Nq, Hq, D], k, v [B, Nk, Hkv, D], Hq a multiple of Hkv; at_q, at_k: where the tokens sit. `out`
    stays float32 for half-precision inputs, so that partials can be merged before the one cast. selection:
    blocks of keys chosen at run time, beyond which nothing is seen or visited. Differentiable once. Raises
    ValueError on shapes that do not fit.
    """
    result: tuple[Tensor, Tensor | None] = _Attention.apply(
        q, k, v, mask, (at_q, at_k), options, backend, selection
    )
    return result


def merge(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Attention over the union of two disjoint key sets: out [B, T, H, D] and lse [B, H, T] (broadcastable)
    of each.

    lse = -inf (or a foreign kernel's +inf) means no visible key. Differentiable; dead rows make no NaN in
    values or gradients.
    """
    (out_a, lse_a), (out_b, lse_b) = a, b
    if not isinstance(lse_a, Tensor) or not isinstance(lse_b, Tensor):
        raise Unsupported("merge needs the lse of both, got None; sigmoid has none: its partial results add")
    dead_a, dead_b = lse_a.isinf(), lse_b.isinf()
    low = torch.full_like(lse_a, float("-inf"))
    top = torch.maximum(torch.where(dead_a, low, lse_a), torch.where(dead_b, low, lse_b)).detach()
    both = top.isinf()
    top = top.masked_fill(both, 0.0)
    # the infinities are replaced *before* exp and log: a where() afterwards would still multiply them into
    # the gradient
    exp_a = torch.where(dead_a, 0.0, (torch.where(dead_a, top, lse_a) - top).exp())
    exp_b = torch.where(dead_b, 0.0, (torch.where(dead_b, top, lse_b) - top).exp())
    whole = torch.where(both, 1.0, exp_a + exp_b)
    lse = torch.where(both, float("-inf"), top + whole.log())
    weight_a, weight_b = ((x / whole).transpose(1, 2)[..., None] for x in (exp_a, exp_b))
    return weight_a * out_a + weight_b * out_b, lse


def combine(a: tuple[Tensor, Tensor | None], b: tuple[Tensor, Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """`merge`, or the plain sum where there is no lse (sigmoid)."""
    if a[1] is None or b[1] is None:
        return a[0] + b[0], None
    return merge((a[0], a[1]), (b[0], b[1]))


def nothing(q: Tensor, options: AttentionOptions = DEFAULT) -> tuple[Tensor, Tensor | None]:
    """The result over no keys: out = 0, lse = -inf (None for sigmoid)."""
    dtype = partial_dtype(q)
    out = torch.zeros(q.shape, dtype=dtype, device=q.device)
    if options.normalizer == "sigmoid":
        return out, None
    return out, torch.full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=dtype, device=q.device)


def row_delta(
    dout: Tensor, out: Tensor, lse: Tensor | None, dlse: Tensor | None, *, backend: Backend = "auto"
) -> Tensor | None:
    """rowsum(dout * out) - dlse, [B, H, T], partial dtype, in which it is summed; the dlse of a row without
    keys counts as 0. None for sigmoid.
    """
    if lse is None:
        return None
    if out.numel() and chosen(out, backend=backend) == "triton":
        found: Tensor = _module("triton", {}, back=True).row_delta(dout, out, lse, dlse)
        return found
    dtype = partial_dtype(out)
    delta = (dout.to(dtype) * out.to(dtype)).sum(-1).transpose(1, 2)
    if dlse is not None:
        delta = delta - dlse.masked_fill(lse.isinf(), 0.0)
    return delta.contiguous()


def partial_dtype(q: Tensor) -> torch.dtype:
    """float32, or float64 for float64 inputs."""
    return torch.promote_types(q.dtype, torch.float32)


def check(q: Tensor, k: Tensor, v: Tensor, mask: Mask, at_q: Spans, at_k: Spans) -> None:
    """Refuse a mask that is none, and shapes, dtypes and spans that do not fit each other."""
    if not isinstance(mask, Mask):
        raise ValueError(f"mask is {mask!r}; it must be a mask, such as Full() where every key is seen")
    if q.ndim != 4 or k.ndim != 4 or k.shape != v.shape:
        raise ValueError(
            f"q, k, v must be [batch, tokens, heads, head_dim] and k like v, got {tuple(q.shape)}, "
            f"{tuple(k.shape)}, {tuple(v.shape)}"
        )
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        raise ValueError(f"q {tuple(q.shape)} and k {tuple(k.shape)} differ in batch or head_dim")
    if not q.shape[3]:
        raise ValueError(f"q is {tuple(q.shape)}: head_dim is 0; it must be at least 1")
    if k.shape[2] == 0 or q.shape[2] % k.shape[2]:
        raise ValueError(f"{q.shape[2]} query heads are not a multiple of {k.shape[2]} kv heads")
    if q.dtype != k.dtype or q.dtype != v.dtype or not q.dtype.is_floating_point:
        raise ValueError(f"q, k, v must share a floating dtype, got {q.dtype}, {k.dtype}, {v.dtype}")
    if not q.device == k.device == v.device:
        raise ValueError(f"q, k, v must be on one device, got {q.device}, {k.device}, {v.device}")
    for name, x, at in (("at_q", q, at_q), ("at_k", k, at_k)):
        if not isinstance(at, tuple) or not all(isinstance(span, Span) for span in at):
            raise ValueError(f"{name} is a {type(at).__name__}; it must be a tuple of Span, not positions")
        if total(at) != x.shape[1]:
            raise ValueError(f"{name} places {total(at)} tokens, but the tensor holds {x.shape[1]}")


def _check_rows(q: Tensor, dout: Tensor, given: dict[str, Tensor | None], options: AttentionOptions) -> None:
    """Refuse what the backward gets of each row, if it does not fit q and the normalizer."""
    rows = (q.shape[0], q.shape[2], q.shape[1])
    for name, x in (given | {"dout": dout}).items():
        if x is not None and x.device != q.device:
            raise ValueError(f"{name} is on {x.device}, but q is on {q.device}")
    for name, x in given.items():
        if (x is None) != (options.normalizer == "sigmoid"):
            has = "needs it" if x is None else "has none"
            raise ValueError(f"{name} is {type(x).__name__}, but the {options.normalizer} backward {has}")
        if x is not None and (x.shape != rows or not x.is_floating_point()):
            raise ValueError(
                f"{name} is {x.dtype} {tuple(x.shape)}; it must be floating, [batch, heads, tokens]: {rows}"
            )
    if dout.shape != q.shape or not dout.is_floating_point():
        raise ValueError(
            f"dout is {dout.dtype} {tuple(dout.shape)}; it must be floating and shaped as q: {tuple(q.shape)}"
        )


def _check_unseen(mask: Mask, q: Tensor, options: AttentionOptions, backend: Backend) -> None:
    """Refuse, where nothing is computed, what computing would refuse."""
    if mask.batch() not in (1, q.shape[0]):
        raise ValueError(f"the mask has documents for {mask.batch()} rows, but the batch has {q.shape[0]}")
    if backend == "cpu":
        cpu.refuse(q, options)


def _check_batch(low: Lowered, q: Tensor) -> None:
    rows = low.tables_q.shape[1]
    if rows not in (1, q.shape[0]):
        raise ValueError(f"the mask has documents for {rows} rows, but the batch has {q.shape[0]}")


__all__ = [
    "AttentionOptions",
    "Selection",
    "Unsupported",
    "attention",
    "backward",
    "chosen",
    "combine",
    "forward",
    "merge",
    "nothing",
    "picked",
]
