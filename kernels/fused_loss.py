"""The loss of a linear layer by others' kernels: liger-kernel's on CUDA, and torch's own chunked operator."""

import inspect
from collections.abc import Callable
from functools import lru_cache
from importlib import import_module
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

LIGER_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TORCH_DTYPES = (torch.float32, torch.float64)


def liger_refusal(x: Tensor, weight: Tensor) -> str | None:
    """Why liger-kernel's loss does not serve these activations and this weight; None if it does."""
    if x.device.type != "cuda":
        return f"x is on {x.device}; it needs a CUDA device"
    if x.dtype not in LIGER_DTYPES or weight.dtype not in LIGER_DTYPES:
        return f"x is {x.dtype} and weight {weight.dtype}; it takes float32, bfloat16 and float16"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled("cuda"):
        return f"x is {x.dtype} and weight {weight.dtype}; without autocast it takes one dtype"
    if not (torch.is_grad_enabled() and x.requires_grad):
        return "x wants no gradient; it makes none without that of x"
    if _liger() is None:
        return (
            "no liger-kernel that sums the weight's gradient in float32 is installed; "
            "pip install 'liger-kernel>=0.6.2'"
        )
    return None


def torch_refusal(x: Tensor, weight: Tensor, z_loss: float) -> str | None:
    """Why torch's operator does not serve this, else None. In bfloat16 it would round the loss itself."""
    if _operator() is None:
        return f"torch {torch.__version__} has no linear_cross_entropy with chunks; 2.13 has"
    if z_loss:
        return f"z_loss is {z_loss}; it has none"
    if x.dtype not in TORCH_DTYPES or x.dtype != weight.dtype or torch.is_autocast_enabled(x.device.type):
        return f"x is {x.dtype} and weight {weight.dtype}; it takes float32 or float64, without autocast"
    if not len(x) or x.device.type not in ("cpu", "cuda"):
        return f"x holds {len(x)} tokens on {x.device}; it takes at least 1, on a CPU or a CUDA device"
    if type(x) is not Tensor or type(weight) not in (Tensor, nn.Parameter):
        return f"x is a {type(x).__name__} and weight a {type(weight).__name__}; it takes plain tensors"
    return None


def by_liger(x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int, z_loss: float) -> Tensor:
    """Sum over valid tokens of cross entropy + z_loss * lse^2, float32; the chunks are of its own choice."""
    whole: Tensor = _Liger.apply(x, weight, labels, ignore_index, z_loss)
    return whole


def by_torch(x: Tensor, weight: Tensor, labels: Tensor, *, ignore_index: int, chunk: int) -> Tensor:
    """Sum over valid tokens of cross entropy, in the dtype of x."""
    operator, options = _operator() or (None, None)
    assert operator is not None and options is not None
    # else a second backward of the same loss is refused
    kept = options(allow_retain_graph=True, batch_chunk_size=chunk)
    whole: Tensor = operator(x, weight, labels, reduction="sum", ignore_index=ignore_index, options=kept)
    return whole


class _Liger(torch.autograd.Function):
    """Around liger-kernel's function, not its own autograd, which scales the kept gradients where they lie:
    a second backward would scale them twice.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, labels: Tensor, ignore_index: int, z_loss: float
    ) -> Tensor:
        run = _liger()
        assert run is not None
        found = run(
            x, weight, labels, ignore_index=ignore_index, lse_square_scale=z_loss, reduction="sum",
            accum_dtype=torch.float32,
        )  # fmt: skip
        # loss, ..., gradients of x, weight and bias: what lies between differs by version
        ctx.save_for_backward(found[-3], found[-2])
        whole: Tensor = found[0]
        return whole

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        dx, dw = (None if g is None else (g * grad).to(g.dtype) for g in ctx.saved_tensors)
        return dx, dw, None, None, None


@lru_cache(maxsize=1)
def _liger() -> Callable[..., Any] | None:
    """liger-kernel's function, imported when it is first asked for; None without one that has accum_dtype."""
    try:
        module = import_module("liger_kernel.ops.fused_linear_cross_entropy")
    except ImportError:
        return None
    run: Callable[..., Any] = module.fused_linear_cross_entropy_forward
    return run if "accum_dtype" in inspect.signature(run).parameters else None


def _operator() -> tuple[Callable[..., Any], Callable[..., Any]] | None:
    """torch's function and its options; None in a torch that is older."""
    operator, options = (
        getattr(F, "linear_cross_entropy", None),
        getattr(nn, "LinearCrossEntropyOptions", None),
    )
    return (operator, options) if operator and options else None
