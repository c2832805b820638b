"""Joint tokens: under every layout, what one device gives where they stand before the sequence."""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cells import build, difference, meshed
from longspan.kernels.attention import AttentionOptions, combine
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, Full, Mask, Window
from longspan.kernels.patterns import Anchored, Strided
from longspan.kernels.span import Span
from longspan.parallel.joint import Joining, Joint, Rows
from longspan.parallel.layout import Layout, shard, unshard
from longspan.parallel.mesh import Mesh
from longspan.parallel.mixed import HeadGroups, Layers
from longspan.parallel.placement import Placement, contiguous
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.single import Single
from longspan.parallel.ulysses import Ulysses
from oracle import plain
from world import Worlds

LAYOUTS = [
    *("ring/contiguous", "ring/zigzag", "ring/striped", "gather/zigzag", "gather1/striped", "ulysses"),
    *("ulysses2", "usp/zigzag", "s2/contiguous", "s2-4/striped"),
]
MASKS: list[Mask] = [
    Full(),
    Causal(),
    Documents(((0, 2, 9, 40), (0, 20, 33, 47)), inner=Causal() & Window(9)),
    Strided(4, 1, 4) & Causal(),
]
STAR = Anchored(8, 8, 40) & Causal()
HEADS = [(4, 4), (8, 2), (4, 1), (5, 5)]
SIGMOID = AttentionOptions(normalizer="sigmoid", bias=-3.5)
Fault = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """ends: whose loss takes the joint rows: the last rank's alone, or a part of each number everybody's."""

    layout: str
    mask: Mask
    heads: tuple[int, int] = (4, 2)
    length: int = 48
    joint: int = 5
    ends: str = "shares"
    options: AttentionOptions = AttentionOptions()
    dtype: torch.dtype = torch.float64

    @property
    def batch(self) -> int:
        return 2


def given(case: Case) -> list[Tensor]:
    """q, k, v, dout, dlse of the joint tokens and, after them, of the sequence; the same on all ranks."""
    generator = torch.Generator().manual_seed(2)
    (hq, hk), n = case.heads, case.joint + case.length
    shapes = [*((case.batch, n, h, 8) for h in (hq, hk, hk, hq)), (case.batch, hq, n)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(case.dtype) for s in shapes]


def one_device(case: Case) -> dict[str, Tensor]:
    """Attention with a dense matrix: joint tokens see all, all see them, and the mask says the rest."""
    q, k, v, dout, dlse = (x.double() for x in given(case))
    q, k, v = (x.requires_grad_() for x in (q, k, v))
    at = (Span(0, case.length),)
    low = lower(case.mask, at, at, case.heads[1], torch.device("cpu"))
    seen = visible(low).expand(-1, case.heads[1], -1, -1).repeat_interleave(case.heads[0] // case.heads[1], 1)
    seen = F.pad(seen, (case.joint, 0, case.joint, 0), value=True)
    out, lse = plain(q, k, v, seen, case.options)
    ends = [(out, dout), (lse, dlse)][: 2 if lse.ndim else 1]
    dq, dk, dv = torch.autograd.grad([x for x, _ in ends], (q, k, v), [g for _, g in ends])
    found = {"out": out.detach(), "dq": dq, "dk": dk, "dv": dv}
    return found | ({"lse": lse.detach().transpose(1, 2)} if lse.ndim else {})


def spread(layout: Layout, case: Case, x: Tensor) -> Tensor:
    """This rank's share of the upstream gradient of the joint rows; those of all ranks add up to x."""
    if case.ends == "one rank":
        return x * (layout.rank == layout.size - 1)
    draws = torch.randn(layout.size, *x.shape, generator=torch.Generator().manual_seed(3)).to(x)
    return x * (draws[layout.rank] - draws.mean(0) + 1 / layout.size)


def everywhere(layout: Layout, case: Case) -> dict[str, Tensor]:
    """What the layout gives, put together again: joint tokens first, gradients of theirs summed."""
    placement = layout.place(case.length, case.mask)
    tokens, n = given(case), case.joint
    top = [x[:, :n].clone().requires_grad_() for x in tokens[:3]]
    low = [shard(layout, x[:, n:], placement, 1).requires_grad_() for x in tokens[:3]]
    q, k, v = low
    out, lse = layout.attention(q, k, v, case.mask, placement, options=case.options, joint=Joint(*top))
    rows = {"out": out} | ({} if lse is None else {"lse": lse.transpose(1, 2)})
    upstream = {"out": tokens[3], "lse": tokens[4].transpose(1, 2)}
    ends = {name: (spread(layout, case, x[:, :n]), x[:, n:]) for name, x in upstream.items()}
    gradients = [torch.cat((ends[name][0], shard(layout, ends[name][1], placement, 1)), 1) for name in rows]
    torch.autograd.backward(
        list(rows.values()), [g.to(x) for g, x in zip(gradients, rows.values(), strict=True)]
    )
    found = {
        name: (same_everywhere(layout, x.detach()[:, :n]), x.detach()[:, n:]) for name, x in rows.items()
    }
    for name, mine, local in zip(("dq", "dk", "dv"), top, low, strict=True):
        assert mine.grad is not None and local.grad is not None
        found[name] = summed(layout, mine.grad), local.grad
    return {
        name: torch.cat((first.double(), unshard(layout, rest.contiguous(), placement, 1).double()), 1)
        for name, (first, rest) in found.items()
    }


def same_everywhere(layout: Layout, x: Tensor) -> Tensor:
    """x, which must have the same bits on every rank."""
    parts = [torch.empty_like(x.contiguous()) for _ in range(layout.size)]
    if layout.group is not None:
        dist.all_gather(parts, x.contiguous(), group=layout.group)
        assert all(part.equal(parts[0]) for part in parts)
    return x


def summed(layout: Layout, x: Tensor) -> Tensor:
    """What an engine does that sums gradients over the ranks of a sequence, in float64."""
    x = x.double()
    if layout.group is not None:
        dist.all_reduce(x, group=layout.group)
    return x


def errors(rank: int, cases: list[Case], size: int, fault: Fault | None = None) -> list[dict[str, float]]:
    """The errors of each case, on rank 0, which holds all that the ranks put together."""
    found = []
    for case in cases:
        with fault() if fault else patch.dict({}):  # type: ignore[attr-defined]
            got = everywhere(build(case.layout, size), case)
        if rank:
            continue
        want = one_device(case)
        assert got.keys() == want.keys()
        found.append({name: difference(got[name], want[name]) for name in want})
    return found


def cases(size: int) -> list[Case]:
    """Every mask under every layout; heads, joint tokens, lengths and ends rotate."""
    turns = itertools.cycle(itertools.product(HEADS, (1, 5), (48, 61), ("one rank", "shares")))
    some = [Case(layout, mask, *next(turns)) for layout in LAYOUTS for mask in MASKS]
    some += [Case("star", STAR, *next(turns)) for _ in range(2)]
    few = [Case("ring/zigzag", Causal(), length=size - 1, joint=2), Case("s2/contiguous", Full(), joint=0)]
    plus = [Case(name, Causal(), options=SIGMOID) for name in (*LAYOUTS[::3], "usp/zigzag")]
    return [*some, *few, *plus, Case("star", STAR, options=SIGMOID)]


@pytest.mark.parametrize("size", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_joint_tokens_are_seen_once_by_all_and_see_all(world: Worlds, size: int) -> None:
    wanted = cases(size)
    found = world(size)(errors, wanted, size)[0]
    bad = [(c, e) for c, e in zip(wanted, found, strict=True) if max(e.values()) > 1e-10]
    assert not bad, f"{len(bad)} of {len(wanted)} cases, first {bad[0]}"


@pytest.mark.parametrize(
    "case", [Case("single", m) for m in MASKS] + [Case("single", Full(), options=SIGMOID)]
)
def test_joint_tokens_on_one_device(case: Case) -> None:
    assert max(errors(0, [case], 1)[0].values()) <= 1e-10


@contextmanager
def counted_by_every_rank() -> Iterator[None]:
    """The planted fault: each rank lets joint queries see the joint keys besides its own."""
    real, kept = Joining._see, list[tuple[object, ...]]()

    def see(self: Joining, q: Tensor, k: Tensor, v: Tensor, at_q: object, at_k: object) -> Rows:
        found = real(self, q, k, v, at_q, at_k)  # type: ignore[arg-type]
        if at_q == self.at:
            kept[:] = [(k, v, at_q, at_k)]
            return found
        joint_k, joint_v, _, at = kept[0]
        return combine(found, real(self, q, joint_k, joint_v, at, at))  # type: ignore[arg-type]

    with patch.object(Joining, "_see", see), patch.object(Joining, "_among", lambda self, joint, part: part):
        yield


def gradients_of_one_rank() -> object:
    """The planted fault: each rank goes on with its own share of the upstream gradient of the joint rows."""
    return patch.object(Joining, "upstream", lambda self, dout, dlse, tokens: (dout, dlse))


def mixed(rank: int, size: int) -> list[dict[str, float]]:
    """The errors of mixtures by head, on one axis and, of 4 ranks, on two, and of each layer's turn of one by
    layer.
    """
    ring, first, rest = (
        meshed(Mesh(ring=size)),
        partial(Ring, placement="contiguous"),
        partial(HeadSharded, block=8),
    )
    layouts: list[Layout] = [
        HeadGroups(ring, first=first, rest=rest),
        HeadGroups(ring, first=partial(Ulysses, axis="ring"), rest=first),
        *Layers(ring, most=rest, rest=first, every=2).turns(),
    ]
    if size == 4:
        inner = [partial(Ulysses, inner=part) for part in (first, rest)]
        layouts.append(HeadGroups(meshed(Mesh(ring=2, head=2)), first=inner[0], rest=inner[1]))
    case = Case("", MASKS[2], (8, 2), 61)
    got = [everywhere(layout, case) for layout in layouts]
    return [{name: difference(one[name], want) for name, want in one_device(case).items()} for one in got]


@pytest.mark.parametrize(("size", "count"), [(3, 4), (4, 5)])
def test_mixtures_serve_joint_tokens(world: Worlds, size: int, count: int) -> None:
    for found in world(size)(mixed, size):
        assert len(found) == count and max(max(error.values()) for error in found) <= 1e-10, found


def test_what_is_counted_twice_or_not_summed_is_seen(world: Worlds) -> None:
    case = Case("ring/zigzag", Causal(), ends="shares")
    right, twice, alone = (
        world(3)(errors, [case], 3, fault)[0][0]
        for fault in (None, counted_by_every_rank, gradients_of_one_rank)
    )
    assert max(right.values()) <= 1e-10
    assert twice["out"] > 1e-3 and twice["lse"] > 1e-3
    assert alone["out"] <= 1e-10 and min(alone["dq"], alone["dk"], alone["dv"]) > 1e-2


def test_float32_and_bfloat16_do_not_drift_with_the_ranks(world: Worlds) -> None:
    exact = [Case(name, Causal(), (8, 2), 61, dtype=torch.float32) for name in LAYOUTS[1::4]]
    # shares of a number in bfloat16 do not add up to it
    rough = [replace(case, length=256, dtype=torch.bfloat16, ends="one rank") for case in exact]
    found = world(4)(errors, [*exact, *rough], 4)[0]
    alone = errors(0, [replace(rough[0], layout="single")], 1)[0]
    for error in found[: len(exact)]:
        assert max(error["out"], error["lse"]) <= 1e-5 and max(error.values()) <= 5e-5
    for error in found[len(exact) :]:
        for name in ("out", "dq", "dk", "dv"):
            assert error[name] <= 1.1 * alone[name], (name, error[name], alone[name])


@pytest.mark.parametrize(
    ("joint", "message"),
    [
        ((1, 3, 4, 8), r"joint.q is \(1, 3, 4, 8\) torch.float32, but q is \(2, 6, 4, 8\)"),
        ((2, 3, 2, 8), r"joint.q is \(2, 3, 2, 8\) torch.float32, but q is \(2, 6, 4, 8\)"),
    ],
)
def test_joint_tokens_that_do_not_fit_are_refused(joint: tuple[int, ...], message: str) -> None:
    q, k, placement = torch.zeros(2, 6, 4, 8), torch.zeros(2, 6, 2, 8), contiguous(6, 1)
    wrong = torch.zeros(joint)
    keys = wrong[:, :, :2]
    with pytest.raises(ValueError, match=message):
        Single().attention(q, k, k, Full(), placement, joint=Joint(wrong, keys, keys))


def sent(rank: int, joint: int) -> tuple[int, int]:
    """(bytes that joint tokens add forward, what the layout counts) on one of 3 ranks."""
    real, moved = dist.all_to_all_single, [0]

    def counting(into: Tensor, flat: Tensor, to: list[int], of: list[int], group: object) -> object:
        moved[0] += (sum(of) - of[rank]) * flat.element_size()
        return real(into, flat, to, of, group=group)

    layout, case = build("ring/contiguous", 3), Case("", Documents((0, 16, 32)), joint=joint)
    placement: Placement = layout.place(case.length, case.mask)
    q, k, v = (shard(layout, x[:, joint:], placement, 1) for x in given(case)[:3])
    with patch.object(dist, "all_to_all_single", counting):
        layout.attention(q, k, v, case.mask, placement, joint=Joint(*(x[:, :joint] for x in given(case)[:3])))
    return moved[0], sum(layout.traffic.sent.values())


def test_traffic_is_counted_and_does_not_grow_with_the_ranks(world: Worlds) -> None:
    # out and lse of a third of 6 tokens: 2 rows, 4 heads, 8 + 1 float64; to each of 2 ranks, there and back
    part = 2 * 2 * 4 * (8 + 1) * 8
    assert world(3)(sent, 6) == [(4 * part, 4 * part)] * 3
