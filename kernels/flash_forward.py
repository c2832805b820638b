"""Attention forward in Triton over tile lists: softmax or sigmoid, any mask, head dims up to 256."""

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .lower import Lowered
from .mask import Mask, Unsupported
from .options import AttentionOptions
from .predicate import constant, operands, visible
from .selection import Selection
from .selection import tiles as selected
from .span import Spans
from .tile import Tiles, check_lists, tiles

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HEAD_DIM = 256
LOG2E = tl.constexpr(math.log2(math.e))
LN2 = tl.constexpr(math.log(2))
# Only float32 operands know precisions: three tensor-core products for one, since TF32 leaves three digits.
PRECISION = tl.constexpr("tf32x3")


Pair = tuple[int, int]


class Block(NamedTuple):
    """Tile size in tokens, and how a kernel runs on it."""

    queries: int
    keys: int
    warps: int
    stages: int


class Config(NamedTuple):
    """A block for each of the three kernels."""

    forward: Block
    dq: Block
    dkdv: Block


# By head dim, padded to a power of two. docs/kernels.md has the registers and spills that they lead to.
HOPPER = {
    64: Config(Block(128, 64, 8, 3), Block(128, 64, 8, 2), Block(64, 128, 8, 2)),
    128: Config(Block(128, 64, 8, 3), Block(128, 64, 8, 2), Block(64, 128, 8, 2)),
    256: Config(Block(128, 64, 8, 2), Block(128, 32, 8, 2), Block(32, 64, 8, 2)),
}
AMPERE = {
    64: Config(Block(128, 64, 8, 3), Block(128, 64, 8, 2), Block(64, 128, 8, 2)),
    128: Config(Block(128, 64, 8, 3), Block(128, 64, 8, 2), Block(64, 64, 8, 2)),
    256: Config(Block(64, 32, 8, 2), Block(32, 32, 4, 2), Block(32, 32, 8, 2)),
}
FLOAT32 = {
    64: Config(Block(64, 32, 4, 2), Block(64, 32, 4, 2), Block(32, 32, 4, 2)),
    128: Config(Block(32, 32, 4, 2), Block(32, 32, 4, 2), Block(16, 32, 4, 2)),
    256: Config(Block(16, 16, 4, 2), Block(16, 16, 4, 2), Block(16, 16, 4, 2)),
}


class Sizes(NamedTuple):
    """Kernel argument: the shapes."""

    batch: int
    heads: int  # query heads
    kv_heads: int
    queries: int
    keys: int


class Scores(NamedTuple):
    """Kernel argument: s = q k^T * scale, in units of log 2; with a cap, tanh(q k^T * scale) * cap."""

    scale: float
    cap: float
    bias: float


def config(head_dim: int, dtype: torch.dtype, capability: tuple[int, int], grain: int = 0) -> Config:
    """Tiles, warps and pipeline stages of the three kernels on a device, for masks of a `grain`."""
    width = max(64, triton.next_power_of_2(head_dim))
    if dtype == torch.float32:
        return FLOAT32[width]
    # data-centre Hopper and Blackwell have 227 KiB of shared memory; what is meant for Ampere fits 99 KiB
    best = (HOPPER if capability[0] in (9, 10) else AMPERE)[width]
    half = best.dkdv.keys // 2
    # a tile of two blocks, of which far queries see one, would be partial and half in vain
    if half >= 64 and grain % best.dkdv.keys and grain % half == 0:
        return best._replace(dkdv=best.dkdv._replace(keys=half))
    return best


def supports(q: Tensor) -> bool:
    """Whether the Triton kernels take this tensor: where it lives, its dtype and its head_dim."""
    return _refusal(q) is None


def require(q: Tensor) -> None:
    """Raise Unsupported, naming what is wrong with `q`."""
    reason = _refusal(q)
    if reason:
        raise Unsupported(f"backend='triton': {reason}")


def _refusal(q: Tensor) -> str | None:
    if q.dtype not in DTYPES:
        return f"q is {q.dtype}; it takes float32, bfloat16 and float16 (float64: backend='reference')"
    if q.shape[-1] > HEAD_DIM:
        return f"q has head_dim {q.shape[-1]}; it takes up to {HEAD_DIM} (more: backend='reference')"
    if q.device.type != "cuda" and isinstance(attention_forward_kernel, triton.runtime.JITFunction):
        return f"q is on {q.device}; it needs a CUDA device (backend='cpu' does not)"
    return None


def capability(q: Tensor) -> tuple[int, int]:
    """Of the device that holds q; in the interpreter, an H100's."""
    return torch.cuda.get_device_capability(q.device) if q.device.type == "cuda" else (9, 0)


def forward(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, low: Lowered, at_q: Spans, at_k: Spans,
    options: AttentionOptions, block: Block | None = None, selection: Selection | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """q [B, Nq, Hq, D], k, v [B, Nk, Hkv, D] -> out [B, Nq, Hq, D], lse [B, Hq, Nq] (None for sigmoid), both
    float32.
    """
    require(q)
    block = fitted(block or config(q.shape[3], q.dtype, capability(q)).forward, selection)
    lists = listed(mask, (at_q, at_k), q, k, block, selection, transpose=False)
    return launch(q, k, v, low=low, lists=lists, options=options, block=block)


def fitted(block: Block, selection: Selection | None) -> Block:
    """The block, or one that divides those of the selection. Unsupported if that were less than 16 tokens."""
    if selection is None:
        return block
    queries, keys = (math.gcd(own, n) for own, n in zip(block[:2], selection.size, strict=True))
    if min(queries, keys) < 16:
        raise Unsupported(
            f"backend='triton': Selection.size is {selection.size}; it takes multiples of 16 tokens "
            "(others: backend='reference')"
        )
    small = queries * keys < block.queries * block.keys
    return block._replace(queries=queries, keys=keys, warps=min(block.warps, 4) if small else block.warps)


def listed(
    mask: Mask, at: tuple[Spans, Spans], q: Tensor, k: Tensor, block: Block, selection: Selection | None, *,
    transpose: bool,
) -> Tiles:  # fmt: skip
    """The tiles of the mask, or those of them that are chosen."""
    size, heads = (block.queries, block.keys), k.shape[2]
    if selection is None:
        return tiles(mask, *at, heads, size=size, transpose=transpose, device=q.device)
    return selected(selection, mask, at, heads, size=size, transpose=transpose)


def launch(
    q: Tensor, k: Tensor, v: Tensor, *, low: Lowered, lists: Tiles, options: AttentionOptions, block: Block
) -> tuple[Tensor, Tensor | None]:
    """`forward` over given lists of tiles of (block.queries, block.keys), which may be made at run time.

    Of a full tile every key is seen, of a partial one what `low` says, of a tile that is not listed none.
    ValueError for lists of other shapes; what makes them (`tile.tiles`, `tile.chosen`) sees to the rest.
    """
    check_lists(lists, *shapes(q, k, block, transpose=False))
    q, scores = scored(q, options)
    q, k, v = dense(q), dense(k), dense(v)
    out = torch.empty(q.shape, dtype=torch.float32, device=q.device)
    lse = None
    if options.normalizer == "softmax":
        lse = torch.empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32, device=q.device)
    sizes = Sizes(q.shape[0], q.shape[2], k.shape[2], q.shape[1], k.shape[1])
    strides, unit = steps(q, k, v)
    with torch.cuda.device_of(q):
        attention_forward_kernel[(sizes.batch * sizes.heads * lists.rows,)](
            q, k, v, out, lse, strides, lists, operands(low), sizes, scores,
            UNIT=unit, **constants(q, low, options, block),
        )  # fmt: skip
    return out, lse


def shapes(q: Tensor, k: Tensor, block: Block, *, transpose: bool) -> tuple[int, int, Pair, Pair]:
    """What `check_lists` asks for: batch rows, kv heads, tokens in rows and in columns, and their tiles."""
    tokens, size = (q.shape[1], k.shape[1]), (block.queries, block.keys)
    return q.shape[0], k.shape[2], tokens[::-1] if transpose else tokens, size[::-1] if transpose else size


def constants(q: Tensor, low: Lowered, options: AttentionOptions, block: Block) -> dict[str, Any]:
    """The compile-time arguments that all three kernels share."""
    return {
        "TREE": constant(low.tree),
        "D": q.shape[3],
        "WIDTH": max(16, triton.next_power_of_2(q.shape[3])),
        "BM": block.queries,
        "BN": block.keys,
        "SIGMOID": options.normalizer == "sigmoid",
        "CAP": options.softcap > 0,
        "num_warps": block.warps,
        "num_stages": block.stages,
    }


def scored(q: Tensor, options: AttentionOptions) -> tuple[Tensor, Scores]:
    """q and the score factors; a negative scale moves into q, since the maximum is taken before scaling."""
    scale, log2e = options.scaling(q.shape[3]), LOG2E.value
    if scale < 0:
        q, scale = -q, -scale
    if options.softcap:
        return q, Scores(scale / options.softcap, options.softcap * log2e, options.bias * log2e)
    return q, Scores(scale * log2e, 1.0, options.bias * log2e)


def dense(x: Tensor) -> Tensor:
    """x, copied only if a row is not contiguous, or rows so far apart that offsets in a tile exceed int32."""
    return x if x.stride(3) == 1 and x.stride(1) < 2**23 else x.contiguous()


def steps(*tensors: Tensor) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Strides of batch, tokens and heads of each tensor in units of up to 8 elements, and the unit.

    Triton itself notices multiples of 16 only, and would load a head dim of 72 element by element.
    """
    unit = math.gcd(8, *(stride for x in tensors for stride in x.stride()[:3]))
    return tuple(tuple(stride // unit for stride in x.stride()[:3]) for x in tensors), unit


@triton.jit
def place(lists, batch, heads):  # type: ignore[no-untyped-def]
    """This program's list row, its tile, batch row and head: longest lists first, then who shares a list."""
    together = heads // lists.heads
    each = together * (batch // lists.batch)
    program = tl.program_id(0)
    row = tl.load(lists.order + program // each)
    group, tile = row // lists.rows, row % lists.rows
    head = group % lists.heads * together + program % together
    return row, tile, group // lists.heads + program % each // together, head


@triton.jit
def borders(lists, row):  # type: ignore[no-untyped-def]
    """Where the full tiles of a row begin and end in the list, and where its partial ones do."""
    full, partial = lists.full + 2 * row, lists.partial + 2 * row
    return tl.load(full), tl.load(full + 1), tl.load(partial), tl.load(partial + 1)


@triton.jit
def matrix(X, strides, b, h, UNIT: tl.constexpr):  # type: ignore[no-untyped-def]
    """The tokens of one batch row and head: where they start, and the stride from one to the next."""
    return X + (b.to(tl.int64) * strides[0] + h.to(tl.int64) * strides[2]) * UNIT, strides[1] * UNIT


@triton.jit
def load_tile(  # type: ignore[no-untyped-def]
    tokens, start, limit, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, CHECK: tl.constexpr
):
    """Tokens from `start` of a [limit, D] matrix as [ROWS, WIDTH]: 0 beyond D; beyond `limit` too if
    CHECK.
    """
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = tokens[0] + start.to(tl.int64) * tokens[1] + (i * tokens[1] + d)
    if CHECK and D < WIDTH:
        return tl.load(at, mask=(start + i < limit) & (d < D), other=0.0)
    elif CHECK:
        return tl.load(at, mask=start + i < limit, other=0.0)
    elif D < WIDTH:
        return tl.load(at, mask=d < D, other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_tile(  # type: ignore[no-untyped-def]
    X, x, b, h, heads, start, limit, ROWS: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr
):
    """Store x [ROWS, WIDTH] into the tokens from `start` of X [batch, limit, heads, D], contiguous."""
    i, d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    first = ((b.to(tl.int64) * limit + start) * heads + h) * D
    tl.store(X + first + (i * (heads * D) + d), x, mask=(start + i < limit) & (d < D))


@triton.jit
def tanh(x):  # type: ignore[no-untyped-def]
    return 1.0 - 2.0 / (1.0 + tl.exp2(x * (2.0 * LOG2E)))


@triton.jit
def sigmoid(x):  # type: ignore[no-untyped-def]
    """Of x in units of log 2."""
    return 1.0 / (1.0 + tl.exp2(-x))


@triton.jit
def attention_forward_kernel(  # type: ignore[no-untyped-def]
    Q, K, V, OUT, LSE, strides, lists, mask, sizes, scores,
    TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SIGMOID: tl.constexpr, CAP: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """One program: one query tile of one head. strides, in UNITs: batch, tokens, heads of q, k, v."""
    row, tile, b, h = place(lists, sizes.batch, sizes.heads)
    kv = h // (sizes.heads // sizes.kv_heads)
    start = tile * BM
    q = load_tile(matrix(Q, strides[0], b, h, UNIT), start, sizes.queries, BM, D, WIDTH, True)
    keys, values = matrix(K, strides[1], b, kv, UNIT), matrix(V, strides[2], b, kv, UNIT)
    full, stop, partial, end = borders(lists, row)
    at = (b % mask.rows, kv, start)
    acc = tl.zeros([BM, WIDTH], tl.float32)
    top, norm = tl.full([BM], float("-inf"), tl.float32), tl.zeros([BM], tl.float32)
    acc, top, norm = _sweep(
        (acc, top, norm), q, keys, values, (lists.index, full, stop), at, mask, sizes, scores,
        False, TREE, D, WIDTH, BM, BN, SIGMOID, CAP,
    )  # fmt: skip
    acc, top, norm = _sweep(
        (acc, top, norm), q, keys, values, (lists.index, partial, end), at, mask, sizes, scores,
        True, TREE, D, WIDTH, BM, BN, SIGMOID, CAP,
    )  # fmt: skip
    if not SIGMOID:
        dead = norm == 0.0
        norm = tl.where(dead, 1.0, norm)
        acc = acc / norm[:, None]
        lse = tl.where(dead, float("-inf"), (top + tl.log2(norm)) * LN2)
        m = start + tl.arange(0, BM)
        tl.store(LSE + (b.to(tl.int64) * sizes.heads + h) * sizes.queries + m, lse, mask=m < sizes.queries)
    store_tile(OUT, acc, b, h, sizes.heads, start, sizes.queries, BM, D, WIDTH)


@triton.jit
def _sweep(  # type: ignore[no-untyped-def]
    state, q, keys, values, listed, at, mask, sizes, scores,
    PARTIAL: tl.constexpr, TREE: tl.constexpr, D: tl.constexpr, WIDTH: tl.constexpr, BM: tl.constexpr,
    BN: tl.constexpr, SIGMOID: tl.constexpr, CAP: tl.constexpr,
):  # fmt: skip
    """Add the listed key tiles to (sum, running maximum, running norm); no mask code unless PARTIAL."""
    acc, top, norm = state
    index, first, last = listed
    # the next column is fetched a step ahead, so that the loads of keys do not wait for it
    column = tl.load(index + first, mask=first < last, other=0)
    for i in range(first, last):
        start = column * BN
        column = tl.load(index + tl.minimum(i + 1, last - 1))
        k = load_tile(keys, start, sizes.keys, BN, D, WIDTH, PARTIAL)
        s = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        factor = scores.scale
        if CAP:
            s = tanh(s * factor)
            factor = scores.cap
        if PARTIAL:
            m, n = at[2] + tl.arange(0, BM)[:, None], start + tl.arange(0, BN)[None, :]
            seen = visible(TREE, mask, at[0], at[1], m, n, sizes.queries, sizes.keys)
            s = tl.where(seen, s * factor, float("-inf"))
            factor = 1.0
        if SIGMOID:
            p = sigmoid(s * factor + scores.bias)
        else:
            new = tl.maximum(top, tl.max(s, 1) * factor)
            shift = new
            if PARTIAL:
                shift = tl.where(new == float("-inf"), 0.0, new)
            p = tl.exp2(s * factor - shift[:, None])
            fade = tl.exp2(top - shift)
            norm = norm * fade + tl.sum(p, 1)
            acc = acc * fade[:, None]
            top = new
        v = load_tile(values, start, sizes.keys, BN, D, WIDTH, PARTIAL)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision=PRECISION)
    return acc, top, norm
