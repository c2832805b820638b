"""Who is measured: Longspan's backends and what people would take instead, each over the same inputs."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from longspan.kernels import sdpa
from longspan.kernels.attention import DEFAULT, Backend, attention
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, Full, Window
from longspan.kernels.neighborhood import Neighborhood, row_major
from longspan.kernels.span import positions

from .area import Sees, by_index
from .cases import Case
from .exact import Given
from .timing import Attempt

Build = Callable[[Case, Given], Attempt]
# What a dense case is held against: the fastest of those that were measured.
DENSE = ("sdpa", "sdpa-flash", "sdpa-cudnn", "flash-attn")


class Skip(Exception):
    """Why someone is not measured at a case."""


@dataclass(frozen=True)
class Contender:
    """Someone to measure. `package`: the distribution whose version counts; torch's own have none."""

    name: str
    build: Build
    package: str | None = None


def contenders(device: torch.device) -> tuple[Contender, ...]:
    """Everyone who can run on a device; Longspan first."""
    if device.type == "cpu":
        return (
            Contender("longspan", ours("cpu")),
            Contender("sdpa", masked_sdpa),
            Contender("reference", reference),
        )
    return (
        Contender("longspan", ours("triton")),
        Contender("longspan-sdpa", ours_by_torch),
        Contender("sdpa-flash", forced_sdpa(SDPBackend.FLASH_ATTENTION)),
        Contender("sdpa-cudnn", forced_sdpa(SDPBackend.CUDNN_ATTENTION)),
        Contender("flex", flex),
        Contender("flash-attn", flash_attn, "flash-attn"),
        Contender("fla", linear, "flash-linear-attention"),
        Contender("natten", natten, "natten"),
    )


def ours(backend: Backend) -> Build:
    def build(case: Case, inputs: Given) -> Attempt:
        def run() -> Tensor:
            # partial results are float32: the cast belongs to what a model pays
            out, _ = attention(*inputs.leaves, case.mask, case.at, case.at, backend=backend)
            return out.to(case.dtype)

        return Attempt(run, inputs.leaves, inputs.dout)

    return build


def ours_by_torch(case: Case, inputs: Given) -> Attempt:
    if not sdpa.supports(inputs.q, case.mask, case.at, case.at, DEFAULT):
        raise Skip("does not do this mask")
    return ours("sdpa")(case, inputs)


def reference(case: Case, inputs: Given) -> Attempt:
    return replace(ours("reference")(case, inputs), slow=True)


def _sdpa(case: Case, inputs: Given, seen: Tensor | None, backends: list[SDPBackend]) -> Attempt:
    grouped = case.shape.q_heads != case.shape.kv_heads
    causal = isinstance(case.mask, Causal)

    def run() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves)
        with sdpa_kernel(backends):
            out = F.scaled_dot_product_attention(q, k, v, seen, is_causal=causal, enable_gqa=grouped)
        return out.transpose(1, 2)

    return Attempt(run, inputs.leaves, inputs.dout)


def forced_sdpa(backend: SDPBackend) -> Build:
    def build(case: Case, inputs: Given) -> Attempt:
        if not isinstance(case.mask, Full | Causal):
            raise Skip("does not do this mask")
        return _sdpa(case, inputs, None, [backend])

    return build


def masked_sdpa(case: Case, inputs: Given) -> Attempt:
    """Whatever torch picks; a mask that it has no name for is given as booleans."""
    plain = isinstance(case.mask, Full | Causal)
    low = lower(case.mask, case.at, case.at, case.shape.kv_heads, inputs.q.device)
    group = case.shape.q_heads // case.shape.kv_heads
    seen = None if plain else visible(low).repeat_interleave(group if case.mask.per_head else 1, 1)
    return _sdpa(case, inputs, seen, [SDPBackend.FLASH_ATTENTION, SDPBackend.MATH])


def mask_mod(sees: Sees, group: int) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
    """The mask as FlexAttention asks for it: of a batch row, a query head and two indices."""
    return lambda b, h, i, j: sees(h // group, i, j)


def flex(case: Case, inputs: Given) -> Attempt:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # every case is a graph of its own; past a few of them dynamo would give up and run eagerly
    torch.compiler.reset()
    group, device = case.shape.q_heads // case.shape.kv_heads, inputs.q.device
    blocks = None
    if not isinstance(case.mask, Full):
        sees = by_index(lower(case.mask, case.at, case.at, case.shape.kv_heads, device))
        heads = case.shape.q_heads if case.mask.per_head else None
        # compiled, since the plain one makes the whole [heads, tokens, tokens] mask first
        make: Any = torch.compile(create_block_mask, dynamic=False)
        blocks = make(mask_mod(sees, group), None, heads, case.tokens, case.tokens, device=str(device))
    compiled: Any = torch.compile(flex_attention, dynamic=False, fullgraph=True)

    def run() -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in inputs.leaves)
        out: Tensor = compiled(q, k, v, block_mask=blocks, enable_gqa=group > 1)
        return out.transpose(1, 2)

    return Attempt(run, inputs.leaves, inputs.dout)


def flash_attn(case: Case, inputs: Given) -> Attempt:
    package, mask = load("flash_attn"), case.mask
    if isinstance(mask, Documents):
        if not isinstance(mask.inner, Causal):
            raise Skip("does not do this mask")
        starts = torch.tensor((*mask.rows()[0], case.tokens), dtype=torch.int32, device=inputs.q.device)
        longest = int(starts.diff().max())

        def run() -> Tensor:
            q, k, v = (x[0] for x in inputs.leaves)
            lengths = (starts, starts, longest, longest)
            out: Tensor = package.flash_attn_varlen_func(q, k, v, *lengths, causal=True)
            return out[None]

        return Attempt(run, inputs.leaves, inputs.dout)
    if not isinstance(mask, Full | Causal | Window):
        raise Skip("does not do this mask")
    sides = (mask.left, mask.right) if isinstance(mask, Window) else (None, None)
    window, causal = tuple(-1 if x is None else x for x in sides), isinstance(mask, Causal)
    return Attempt(
        lambda: package.flash_attn_func(*inputs.leaves, causal=causal, window_size=window),
        inputs.leaves,
        inputs.dout,
    )


def linear(case: Case, inputs: Given) -> Attempt:
    """flash-linear-attention's softmax attention: its linear kernels compute something else."""
    package = load("fla.ops.attn.parallel")
    if not isinstance(case.mask, Causal):
        raise Skip("does not do this mask")
    return Attempt(lambda: package.parallel_attn(*inputs.leaves), inputs.leaves, inputs.dout)


def natten(case: Case, inputs: Given) -> Attempt:
    package, mask = load("natten"), case.mask
    if not isinstance(mask, Neighborhood) or len(mask.grid) != 3:
        raise Skip("does not do this mask")
    if case.shape.q_heads != case.shape.kv_heads:
        raise Skip("does not do grouped heads")
    back = row_major(case.at).to(inputs.q.device)
    q, k, v, dout = (x.detach()[:, back].requires_grad_() for x in (*inputs.leaves, inputs.dout))
    kind: dict[str, Any] = {"stride": mask.stride, "dilation": mask.dilation, "is_causal": mask.causal}

    def run() -> Tensor:
        cells = (x.unflatten(1, tuple(mask.grid)) for x in (q, k, v))
        out: Tensor = package.na3d(*cells, kernel_size=mask.window, **kind)
        return out.flatten(1, 3)

    return Attempt(run, (q, k, v), dout.detach(), order=positions(case.at, dout.device))


def load(name: str) -> Any:
    """The module of that name, or Skip."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name and name.split(".")[0] == error.name.split(".")[0]:
            raise Skip("not installed") from error
        raise Skip(f"does not import: {error}") from error
    except (ImportError, OSError) as error:
        raise Skip(f"does not import: {error}") from error
