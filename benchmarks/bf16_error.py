"""Error of bfloat16 attention against float64 by the number of ranks, beside a ring that sums in bfloat16:
`torchrun --standalone --nproc-per-node 8 -m benchmarks.bf16_error`.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from longspan.kernels.attention import attention, backward, forward, merge, nothing, row_delta
from longspan.kernels.mask import Causal, Mask
from longspan.kernels.patterns import Anchored
from longspan.kernels.span import Span, Spans, positions
from longspan.parallel.gather import Gather
from longspan.parallel.layout import Layout, shard, unshard
from longspan.parallel.mesh import Mesh
from longspan.parallel.placement import zigzag
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.single import Single
from longspan.parallel.star import Star
from longspan.parallel.ulysses import Ulysses

SIZES = (1, 2, 4, 8)
TENSORS = ("out", "dq", "dk", "dv")
TOKENS, Q_HEADS, KV_HEADS, HEAD_DIM = 256, 8, 2, 32
DRIFTING = "ring that sums in bfloat16"
STAR = Anchored(32, 32, 192) & Causal()
Given = tuple[Tensor, Tensor, Tensor, Tensor]  # q, k, v, dout


@dataclass(frozen=True)
class Row:
    """Relative norms of the errors of one layout on so many ranks."""

    layout: str
    ranks: int
    out: float
    dq: float
    dk: float
    dv: float


Make = Callable[[DeviceMesh], Layout]
LAYOUTS: dict[str, tuple[Make, str, Mask]] = {
    "ring": (partial(Ring, placement="zigzag"), "ring", Causal()),
    "gather": (partial(Gather, placement="zigzag"), "ring", Causal()),
    "ulysses": (Ulysses, "head", Causal()),
    "usp": (partial(Ulysses, inner=partial(Ring, placement="zigzag")), "both", Causal()),
    "s2": (partial(HeadSharded, placement="contiguous"), "ring", Causal()),
    "star": (Star, "ring", STAR),
}


def degrees(axes: str, ranks: int) -> Mesh:
    """`ranks` processes of the world's first ones hold a sequence; the others are copies (dp)."""
    head = {"ring": 1, "head": ranks, "both": min(2, ranks)}[axes]
    return Mesh(head=head, ring=ranks // head)


def given(tokens: int = TOKENS) -> Given:
    """q, k, v, dout [1, tokens, heads, HEAD_DIM], bfloat16, the same everywhere."""
    generator = torch.Generator().manual_seed(0)
    q, k, v, dout = (
        torch.randn(1, tokens, heads, HEAD_DIM, generator=generator).bfloat16()
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS, Q_HEADS)
    )
    return q, k, v, dout


def exact(x: Given, mask: Mask) -> list[Tensor]:
    """out, dq, dk, dv of one device in float64, by definition."""
    q, k, v = (t.double().requires_grad_() for t in x[:3])
    at = (Span(0, q.shape[1]),)
    out, _ = attention(q, k, v, mask, at, at, backend="reference")
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), x[3].double())]


def found(layout: Layout, x: Given, mask: Mask) -> list[Tensor]:
    """out, dq, dk, dv that the layout gives, put together on each of its ranks."""
    placement = layout.place(x[0].shape[1], mask)
    q, k, v, dout = (shard(layout, t, placement, 1) for t in x)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    out, _ = layout.attention(q, k, v, mask, placement)
    parts = [out.detach(), *torch.autograd.grad(out, (q, k, v), dout)]
    return [unshard(layout, part, placement, 1) for part in parts]


def drifting(x: Given, mask: Mask, ranks: int) -> list[Tensor]:
    """out, dq, dk, dv of a ring whose partial results and travelling gradients are bfloat16, on virtual
    ranks: what this package avoids.
    """
    spans = zigzag(x[0].shape[1], ranks).spans_by_rank
    at = [positions(s) for s in spans]
    order = torch.cat(at).argsort()
    q, k, v, dout = ([t[:, rows] for rows in at] for t in x)
    outs: list[Tensor] = []
    dq: list[Tensor] = []
    dkv = [torch.zeros(2, *t.shape).bfloat16() for t in k]
    for rank in range(ranks):
        hops = [(rank - hop) % ranks for hop in range(ranks)]
        out, lse = _rounded(q[rank], [(k[s], v[s], spans[s]) for s in hops], mask, spans[rank])
        delta = row_delta(dout[rank], out.float(), lse, None)
        total = torch.zeros(q[rank].shape).bfloat16()
        for s in hops:
            own = backward(dout[rank], delta, q[rank], k[s], v[s], lse, mask, spans[rank], spans[s])
            total += own[0].bfloat16()
            dkv[s] += torch.stack(own[1:]).bfloat16()
        outs.append(out)
        dq.append(total)
    whole = [torch.cat(parts, 1) for parts in (outs, dq, [g[0] for g in dkv], [g[1] for g in dkv])]
    return [part.index_select(1, order) for part in whole]


def _rounded(
    q: Tensor, shards: list[tuple[Tensor, Tensor, Spans]], mask: Mask, at: Spans
) -> tuple[Tensor, Tensor]:
    """Attention over shard after shard, rounded to bfloat16 after each."""
    out, lse = nothing(q)
    assert lse is not None
    for k, v, theirs in shards:
        part, part_lse = forward(q, k, v, mask, at, theirs)
        assert part_lse is not None
        out, lse = merge((out, lse), (part.bfloat16().float(), part_lse))
        out = out.bfloat16().float()
    return out.bfloat16(), lse


def errors(got: list[Tensor], right: list[Tensor]) -> list[float]:
    """Relative norm of each difference."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, right, strict=True)]


def measure(rank: int) -> list[Row]:
    """The rows, on rank 0 of a world that can hold the greatest of SIZES; the other ranks take part."""
    x = given()
    right = {mask: exact(x, mask) if rank == 0 else [] for mask in (Causal(), STAR)}
    rows: list[Row] = []
    for name, (make, axes, mask) in LAYOUTS.items():
        for ranks in SIZES:
            mesh = degrees(axes, ranks).build("cpu")
            layout = Single() if ranks == 1 else make(mesh)
            if rank < ranks:
                got = found(layout, x, mask)
                rows += [Row(name, ranks, *errors(got, right[mask]))] if rank == 0 else []
    if rank == 0:
        rows += [
            Row(DRIFTING, ranks, *errors(drifting(x, Causal(), ranks), right[Causal()])) for ranks in SIZES
        ]
    return rows


def worst(rows: list[Row], name: str) -> float:
    """The greatest error of a layout on several ranks, over that on one, of all tensors."""
    one = next(r for r in rows if r.layout == name and r.ranks == 1)
    several = [r for r in rows if r.layout == name and r.ranks > 1]
    return max(getattr(r, tensor) / getattr(one, tensor) for r in several for tensor in TENSORS)


def table(rows: list[Row]) -> str:
    """The rows as Markdown."""

    def lines() -> Iterator[str]:
        yield f"| layout | tensor | {' | '.join(f'P = {n}' for n in SIZES)} | worst / P = 1 |"
        yield f"|---|---|{'---|' * len(SIZES)}---|"
        for name in dict.fromkeys(r.layout for r in rows):
            for tensor in TENSORS:
                each = [getattr(r, tensor) for n in SIZES for r in rows if (r.layout, r.ranks) == (name, n)]
                values = " | ".join(f"{e:.2e}" for e in each)
                yield f"| {name} | {tensor} | {values} | {max(each[1:]) / each[0]:.3f} |"

    return "\n".join(lines())


def main() -> None:
    """Measures on the processes that torchrun started; rank 0 writes and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "bf16.json")
    args = parser.parse_args()
    dist.init_process_group("gloo")
    try:
        rows = measure(dist.get_rank())
        if dist.get_rank() == 0:
            shape = {"tokens": TOKENS, "heads": [Q_HEADS, KV_HEADS], "head_dim": HEAD_DIM}
            text = json.dumps(
                shape | {"torch": torch.__version__, "rows": [asdict(r) for r in rows]}, indent=1
            )
            args.out.write_text(text + "\n")
            print(table(rows))
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
