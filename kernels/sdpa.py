"""Plain full and causal attention by torch's own operators on CUDA, cuDNN's or FlashAttention's.

They give no mask but these two, and round what they give: each partial `out` and each of dq, dk, dv comes in
the dtype of q and is only then widened to the float32 of the contract. One call loses nothing by it that the
last cast would not have lost; a ring sums as many rounded gradients as it has hops, which this package's own
kernels do not. Nothing chooses them yet: they are for backend='sdpa'.
"""

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from . import flash_backward
from .lower import Lowered
from .mask import Bound, Causal, Full, Mask, Unsupported
from .options import AttentionOptions
from .span import Spans

Operator = Literal["cudnn", "flash"]
DTYPES = (torch.bfloat16, torch.float16)
LARGE = ((8, 0), (9, 0), (10, 0), (10, 3))  # with the shared memory that a backward over 256 wide heads needs


def supports(q: Tensor, mask: Mask, at_q: Spans, at_k: Spans, options: AttentionOptions) -> bool:
    """Whether torch's operators compute this: device, dtype, head_dim, options, the mask on these tokens."""
    return _refusal(q, mask, at_q, at_k, options) is None


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, low: Lowered, at_q: Spans, at_k: Spans,
    options: AttentionOptions, operator: Operator | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """q [B, Nq, Hq, D], k, v [B, Nk, Hkv, D] -> out [B, Nq, Hq, D], lse [B, Hq, Nq], both float32.

    `out` carries one rounding to the dtype of q. Raises Unsupported for what the operators cannot do.
    """
    causal = _causal_flag(q, mask, at_q, at_k, options)
    scale = options.scaling(q.shape[3])
    q, k, v = _heads_first(q, k, v)
    if (operator or preferred(q)) == "cudnn":
        run = torch.ops.aten._scaled_dot_product_cudnn_attention
        out, lse = run(q, k, v, None, True, 0.0, causal, False, scale=scale)[:2]
    else:
        run = torch.ops.aten._scaled_dot_product_flash_attention
        out, lse = run(q, k, v, 0.0, causal, False, scale=scale)[:2]
    return out.transpose(1, 2).float(), lse.reshape(q.shape[:3]).float()


def backward(
    dout: Tensor, delta: Tensor | None, q: Tensor, k: Tensor, v: Tensor, lse: Tensor | None, mask: Mask,
    low: Lowered, at_q: Spans, at_k: Spans, options: AttentionOptions, operator: Operator | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dq, dk, dv over these keys, float32 after one rounding; lse and delta [B, Hq, Nq] are the whole row's.

    The operators take `out` and make delta of it: they get one that leads to the given delta, whatever dlse
    is in it. A row whose dout is 0 and whose delta is not has none; then Triton does the whole backward. To
    know that, the host waits for the device.
    """
    causal = _causal_flag(q, mask, at_q, at_k, options)
    assert lse is not None and delta is not None
    dout = dout.to(q.dtype)
    out, lost = stand_in(dout, delta)
    if bool(lost.any()):
        return flash_backward.backward(dout, delta, q, k, v, lse, mask, low, at_q, at_k, options)
    scale = options.scaling(q.shape[3])
    q, k, v, dout, out = _heads_first(q, k, v, dout.contiguous(), out)
    lse, lengths = lse.float().contiguous(), (q.shape[2], k.shape[2])
    # neither reads the state of the random generator without dropout
    if (operator or preferred(q)) == "cudnn":
        seed, offset = (torch.empty((), dtype=torch.int64, device=q.device) for _ in range(2))
        grads = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
            dout, q, k, v, out, lse.unsqueeze(3), seed, offset, None, None, None, *lengths, 0.0, causal,
            scale=scale,
        )  # fmt: skip
    else:
        seed, offset = (torch.empty(size, dtype=torch.uint64, device=q.device) for size in ((2,), ()))
        grads = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            dout, q, k, v, out, lse, None, None, *lengths, 0.0, causal, seed, offset, scale=scale
        )
    dq, dk, dv = (x.transpose(1, 2).float() for x in grads)
    return dq, dk, dv


def preferred(q: Tensor) -> Operator:
    """cuDNN's where it is the faster one by what is published: Hopper and data-centre Blackwell."""
    newest = torch.cuda.get_device_capability(q.device)[0] in (9, 10)
    return "cudnn" if newest and q.shape[-1] <= 128 and torch.backends.cudnn.is_available() else "flash"


def stand_in(dout: Tensor, delta: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lost): dout [B, N, H, D] times a number a row, so that rowsum(dout * out) is delta [B, H, N], and
    the rows, bool [B, N, H], that no number does it for.

    All products in that sum have one sign, so that rounding `out` to the dtype of dout costs delta no more
    than it costs one of them, where a real `out` may cancel.
    """
    wide, wanted = dout.float(), delta.float().transpose(1, 2)[..., None]
    # by its greatest element first: squares of small numbers would vanish
    top = wide.abs().amax(-1, keepdim=True)
    unit = wide / top.masked_fill(top == 0, 1.0)
    square = unit.square().sum(-1, keepdim=True)
    factor = torch.where(wanted == 0, 0.0, wanted / top / square)
    out = (unit * factor).to(dout.dtype)
    return out, ~out.isfinite().all(-1)


def causal_flag(mask: Mask, at_q: Spans, at_k: Spans) -> bool | None:
    """What to set `is_causal` to for this mask on these tokens; None where neither value says the mask.

    Causal over the same run of positions is causal, over keys that are none of them later it is full.
    """
    mask = mask.mask if isinstance(mask, Bound) else mask
    if isinstance(mask, Full):
        return False
    if not isinstance(mask, Causal):
        return None
    q, k = ([s for s in at if s.length] for at in (at_q, at_k))
    if max(s.last for s in k) <= min(s.start for s in q):
        return False
    in_turn = all(s.contiguous for s in q) and all(b.start == a.last + 1 for a, b in pairwise(q))
    return True if q == k and in_turn else None


def _refusal(q: Tensor, mask: Mask, at_q: Spans, at_k: Spans, options: AttentionOptions) -> str | None:
    head_dim, scale = q.shape[-1], options.scaling(q.shape[-1])
    if options.normalizer != "softmax" or options.softcap:
        return f"the scores are {options.normalizer} with softcap {options.softcap}; it does softmax without"
    if scale <= 0:
        return f"scale is {scale}; it takes scales above 0"
    if causal_flag(mask, at_q, at_k) is None:
        return (
            f"the mask is {mask}; it does Full, and Causal where queries and keys are the same run of "
            "positions or no key is later than a query"
        )
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}; it takes bfloat16 and float16"
    if head_dim > 256 or head_dim % 8:
        return f"q has head_dim {head_dim}; it takes multiples of 8 up to 256"
    if q.device.type != "cuda":
        return f"q is on {q.device}; it needs a CUDA device (backend='cpu' does not)"
    capability = torch.cuda.get_device_capability(q.device)
    if capability < (8, 0):
        return f"the device has compute capability {capability}; it needs (8, 0) or more"
    if head_dim > 192 and capability not in LARGE:
        return f"q has head_dim {head_dim}; on compute capability {capability} it takes up to 192"
    return None


def _causal_flag(q: Tensor, mask: Mask, at_q: Spans, at_k: Spans, options: AttentionOptions) -> bool:
    """`causal_flag`, or Unsupported naming what the operators cannot do."""
    reason = _refusal(q, mask, at_q, at_k, options)
    if reason:
        raise Unsupported(f"backend='sdpa': {reason}; backend='triton' does more")
    return bool(causal_flag(mask, at_q, at_k))


def _heads_first(*tensors: Tensor) -> list[Tensor]:
    """[B, N, H, D] -> [B, H, N, D]; the operators want stride 1 in D."""
    return [(x if x.stride(-1) == 1 else x.contiguous()).transpose(1, 2) for x in tensors]
