"""On a GPU: every mask, head dim and dtype against float64, torch's own operators too, and what only shows
there. The cases run in processes of their own, for most of their time is compilation.
"""

import os
import traceback
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from longspan.kernels import cpu, flash_backward, flash_forward, reference, sdpa
from longspan.kernels.attention import attention, chosen, combine, row_delta
from longspan.kernels.heads import PerHead
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Frames, FrameTiles, Neighborhood, brick_order
from longspan.kernels.options import AttentionOptions
from longspan.kernels.patterns import Anchored, BlockPermutation, Chunks, Shifted, Strided, Tail
from longspan.kernels.span import Span, Spans, cut, total
from longspan.kernels.tile import tiles

Errors = dict[str, float]
HEADS = 8, 4
LINE = (Span(0, 1011),)
ZIGZAG = Span(250, 260), Span(1500, 241)
STRIPED = Span(1, 300, 1, 3), Span(900, 213)
GRID, BRICK = (8, 12, 20), (2, 4, 5)
BATCHED = ((0, 300, 301, 900), (0, 64, 512, 1011))
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DIMS = (16, 32, 40, 64, 72, 80, 96, 128, 192, 256)

near = Neighborhood(GRID, (6, 12, 15), stride=BRICK)
MASKS: dict[str, tuple[Mask, Spans]] = {
    "full": (Full(), LINE),
    "causal": (Causal(), LINE),
    "window": (Window(100), LINE),
    "window both": (Window(30, 77), LINE),
    "first": (First(37), LINE),
    "sinks": (Window(200) | (First(4) & Causal()), LINE),
    "documents": (Documents((0, 300, 301, 900), Causal()), LINE),
    "documents of rows": (Documents(BATCHED), LINE),
    "documents of s2": (Documents((0, 400), Strided(16, 2, 4) & Causal()), LINE),
    "tail": (Tail(700) | Causal(), LINE),
    "s2": (Strided(64, 2, 4) & Causal(), LINE),
    "s2 odd": (Strided(48, 1, 7, offset=3) & Causal(), LINE),
    "s2 dense head": (Strided(32, 2, 8, dense_heads=1) & Causal(), LINE),
    "hepos": (Strided(1, 0, 4), LINE),
    "star": (Anchored(128, 40, 900) & Causal(), LINE),
    "chunks": (Chunks(96, 17), LINE),
    "longlora": (Shifted(128, (0, 64)) & Causal(), LINE),
    "scca": (Shifted(120, (0, 30, 60, 90)), LINE),
    "blockbert": (BlockPermutation(256, 4), LINE),
    "1d": (Neighborhood((1011,), 65, dilation=3, stride=4), LINE),
    "2d": (Neighborhood((31, 32), (7, 16), stride=(2, 4), causal=(False, True)), (Span(0, 992),)),
    "3d": (near, (Span(0, 1920),)),
    "3d bricks": (near, brick_order(GRID, BRICK)),
    "3d dilated": (
        Neighborhood((8, 10, 12), 3, dilation=(2, 1, 4), causal=(True, False, False)),
        (Span(0, 960),),
    ),
    "frames": (Frames(77), LINE),
    "frame tiles": (FrameTiles(64, 4), LINE),
    "per head": (PerHead((Causal(), Window(128), Window(128) | (First(8) & Causal()), Full())), LINE),
    "bound heads": ((Strided(64, 1, 8) & Causal()).heads((6, 1, 1, 3), 8), LINE),
    "zigzag": (Causal(), ZIGZAG),
    "striped": (Window(400) & Causal(), STRIPED),
    "union": ((Strided(64, 1, 4) | Documents((0, 500), First(9))) & Causal() | Window(3, 3), LINE),
}


@dataclass(frozen=True)
class Case:
    """A mask by name over its tokens. operator: torch's, for backend='sdpa'; None is Triton."""

    mask: str
    head_dim: int = 128
    dtype: str = "bfloat16"
    heads: tuple[int, int] = HEADS
    batch: int = 2
    options: AttentionOptions = AttentionOptions()
    operator: sdpa.Operator | None = None
    keys: tuple[int, int] | None = None  # some of the keys only: from, to

    def __str__(self) -> str:
        heads, options = self.heads, self.options
        parts = [
            f"{self.mask}, {self.head_dim}, {self.dtype}",
            *([f"{heads[0]} and {heads[1]} heads"] if heads != HEADS else []),
            *([f"{options.normalizer}, cap {options.softcap}"] if options != AttentionOptions() else []),
            *([f"keys {self.keys[0]} to {self.keys[1]}"] if self.keys else []),
            *([self.operator] if self.operator else []),
        ]
        return ", ".join(parts)


def cases() -> list[Case]:
    """Every mask in every dtype and at the usual head dim, every head dim in every dtype, and the options."""
    found = [Case(name) for name in MASKS]
    for (i, name), (j, dtype) in product(enumerate(MASKS), enumerate(DTYPES)):
        found.append(Case(name, DIMS[(i + 3 * j) % len(DIMS)], dtype))
    found += [Case(name, dim, dtype) for name, dim, dtype in product(("causal", "s2"), DIMS, DTYPES)]
    sigmoid = AttentionOptions(normalizer="sigmoid", bias=-7.0)
    scores = sigmoid, replace(sigmoid, softcap=9.0), AttentionOptions(softcap=20.0)
    found += [Case("causal", dim, options=options) for options, dim in product(scores, (64, 256))]
    return list(dict.fromkeys(found))


def by_torch() -> list[Case]:
    """What torch's operators do: full, causal and earlier keys, in two dtypes, with all kinds of heads."""
    found = []
    operators: tuple[sdpa.Operator, ...] = ("flash", "cudnn")
    for operator, dtype, dim in product(operators, ("bfloat16", "float16"), (64, 72, 96, 128, 256)):
        if operator == "flash" or dim <= 128:
            causal = Case("causal", dim, dtype, operator=operator)
            full = replace(causal, mask="full", heads=(4, 4))
            found += [causal, replace(causal, heads=(4, 1), batch=1), full, replace(full, keys=(0, 333))]
    return found


def run(case: Case, device: str) -> Errors:
    """Errors of out, lse, dq, dk, dv against float64, relative norms."""
    torch.manual_seed(0)
    mask, at = MASKS[case.mask]
    at_k = cut(at, *case.keys) if case.keys else at
    (hq, hk), n, m = case.heads, total(at), total(at_k)
    shapes = [(case.batch, length, h, case.head_dim) for length, h in ((n, hq), (m, hk), (m, hk), (n, hq))]
    q, k, v, dout = (torch.randn(s, device=device).to(DTYPES[case.dtype]) for s in shapes)
    dlse = torch.randn(case.batch, hq, n, device=device)
    low = lower(mask, at, at_k, hk, q.device)
    exact = q.double(), k.double(), v.double()
    out, lse = reference.forward(*exact, low, case.options)
    delta = row_delta(dout.double(), out, lse, dlse)
    grads = reference.backward(dout.double(), delta, *exact, lse, low, case.options)
    found = halves(case, (q, k, v), (dout, dlse), (mask, low, at, at_k))
    wanted = {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    wanted |= {} if lse is None else {"lse": lse}
    assert found.keys() == wanted.keys()
    return {name: difference(found[name], x) for name, x in wanted.items()}


def halves(case: Case, given: Any, ends: tuple[Tensor, Tensor], where: Any) -> dict[str, Tensor]:
    """out, lse and gradients, by the backend's two halves."""
    dout, dlse = ends
    kind: dict[str, Any] = {} if case.operator is None else {"operator": case.operator}
    backend: Any = cpu if dout.device.type == "cpu" else sdpa if case.operator else None
    out, lse = (backend or flash_forward).forward(*given, *where, case.options, **kind)
    delta = row_delta(dout, out, lse, dlse)
    grads = (backend or flash_backward).backward(dout, delta, *given, lse, *where, case.options, **kind)
    found = {"out": out, **dict(zip(("dq", "dk", "dv"), grads, strict=True))}
    assert all(x.dtype == torch.float32 for x in found.values())
    return found if lse is None else {**found, "lse": lse}


def difference(got: Tensor, want: Tensor) -> float:
    """Relative norm; rows without keys must be the same ones, and a NaN is infinitely wrong."""
    if got.shape != want.shape or not torch.equal(got.isinf(), want.isinf()) or bool(got.isnan().any()):
        return float("inf")
    got, want = (x.double().masked_fill(x.isinf(), 0) for x in (got, want))
    return float((got - want).norm() / want.norm()) if want.norm() else float(got.norm())


def bound(dtype: str, tensor: str) -> float:
    if tensor == "lse" or (dtype == "float32" and tensor == "out"):
        return 1e-5
    return 5e-5 if dtype == "float32" else torch.finfo(DTYPES[dtype]).eps


def attempt(case: Case) -> Errors | str:
    """`run` on a GPU, or how it failed."""
    try:
        return run(case, "cuda")
    except Exception:
        return traceback.format_exc()


@pytest.fixture(scope="module")
def found(request: pytest.FixtureRequest) -> Iterator[dict[Case, Future[Errors | str]]]:
    """All cases that this session asks for, under way in a few processes."""
    here = [item for item in request.session.items if item.path == Path(__file__)]
    calls = [getattr(item, "callspec", None) for item in here]
    asked = [call.params["case"] for call in calls if call and "case" in call.params]
    with ProcessPoolExecutor(min(12, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
        yield {case: pool.submit(attempt, case) for case in dict.fromkeys(asked)}


@pytest.mark.gpu
@pytest.mark.parametrize("case", [*cases(), *by_torch()], ids=str)
def test_kernels_equal_float64(case: Case, found: dict[Case, Future[Errors | str]]) -> None:
    errors = found[case].result()
    assert isinstance(errors, dict), errors
    for tensor, error in errors.items():
        assert error <= bound(case.dtype, tensor), f"{tensor} is wrong by {error:.1e}"


def leaves(tokens: int, head_dim: int = 64, heads: tuple[int, int] = HEADS) -> list[Tensor]:
    """q, k, v and dout in bfloat16 on the GPU."""
    torch.manual_seed(1)
    shapes = [(1, tokens, h, head_dim) for h in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(s, device="cuda").bfloat16() for s in shapes]


def through_the_door(given: list[Tensor], mask: Mask, at: Spans, **kinds: Any) -> list[Tensor]:
    """out, lse and the gradients by autograd, with a gradient of the lse too."""
    q, k, v = (x.detach().requires_grad_() for x in given[:3])
    out, lse = attention(q, k, v, mask, at, at, **kinds)
    assert lse is not None
    grads = torch.autograd.grad((out, lse), (q, k, v), (given[3].float(), torch.ones_like(lse)))
    return [out.detach(), lse.detach(), *grads]


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "sdpa"])
def test_the_door_on_a_gpu_is_differentiable(backend: Any) -> None:
    given = leaves(777)
    assert chosen(given[0]) == "triton" and chosen(given[0].double()) == "reference"
    at = (Span(0, 777),)
    got = through_the_door(given, Causal(), at, backend=backend)
    want = through_the_door([x.double() for x in given], Causal(), at)
    for a, b in zip(got, want, strict=True):
        assert difference(a, b) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["causal", "s2", "documents of s2", "3d bricks"])
def test_the_same_input_gives_the_same_bits_and_hidden_tokens_change_none(name: str) -> None:
    mask, at = MASKS[name]
    given = leaves(total(at))
    first, second = (through_the_door(given, mask, at) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    low = lower(mask, at, at, HEADS[1], torch.device("cuda"))
    seen = visible(low).expand(1, HEADS[1], -1, -1)[0]
    key = total(at) // 2
    blind = ~seen[..., key].repeat_interleave(HEADS[0] // HEADS[1], 0)  # [query heads, queries]
    assert blind.any() and not blind.all()
    given[1][:, key] = 50.0
    given[2][:, key] = -70.0
    out, lse, dq, *_ = through_the_door(given, mask, at)
    for a, b in ((out, first[0]), (dq, first[2])):
        assert torch.equal(a[0].transpose(0, 1)[blind], b[0].transpose(0, 1)[blind])
    assert torch.equal(lse[0][blind], first[1][0][blind])


@pytest.mark.gpu
@pytest.mark.parametrize("stopped", [False, True])
def test_torch_operators_merge_to_the_whole_and_hand_over_what_they_cannot(stopped: bool) -> None:
    """Two shards of keys as a ring holds them; `stopped`: one row's lse alone has a gradient."""
    q, k, v, dout = leaves(640, 128)
    own, options = (Span(320, 320),), AttentionOptions()
    q, dout, dlse = q[:, 320:], dout[:, 320:].contiguous(), torch.randn(1, HEADS[0], 320, device="cuda")
    if stopped:
        dout[:, 7] = 0
    shards: list[Any] = []
    for keys, at in ((slice(0, 320), (Span(0, 320),)), (slice(320, 640), own)):
        low = lower(Causal(), own, at, HEADS[1], q.device)
        shards.append((k[:, keys], v[:, keys], (Causal(), low, own, at, options)))
    out, lse = combine(*(sdpa.forward(q, a, b, *where) for a, b, where in shards))
    delta = row_delta(dout, out, lse, dlse)
    got = [sdpa.backward(dout, delta, q, a, b, lse, *where) for a, b, where in shards]
    dq, dk, dv = zip(*got, strict=True)

    low = lower(Causal(), own, (Span(0, 640),), HEADS[1], q.device)
    exact = q.double(), k.double(), v.double()
    right = reference.forward(*exact, low, options)
    delta = row_delta(dout.double(), *right, dlse)
    want = reference.backward(dout.double(), delta, *exact, right[1], low, options)
    for a, b in zip((dq[0] + dq[1], torch.cat(dk, 1), torch.cat(dv, 1)), want, strict=True):
        assert difference(a, b) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.gpu
def test_tensors_of_more_than_two_billion_elements() -> None:
    """Offsets beyond int32: the last queries against float64. Needs about 60 GiB."""
    tokens, rows, reach = 270_000, 300, 500
    given = leaves(tokens, 128, (64, 8))
    assert given[0].numel() > 2**31
    mask, at = Window(reach), (Span(0, tokens),)
    out, lse, dq, *_ = through_the_door(given, mask, at)
    last = [x[:, -n:].double() for x, n in zip(given, (rows, rows + reach, rows + reach, rows), strict=True)]
    q, k, v = (x.requires_grad_() for x in last[:3])
    want, want_lse = attention(
        q, k, v, mask, cut(at, tokens - rows, tokens), cut(at, tokens - rows - reach, tokens)
    )
    assert want_lse is not None
    want_dq = torch.autograd.grad((want, want_lse), q, (last[3], torch.ones_like(want_lse)))[0]
    for a, b in ((out[:, -rows:], want), (dq[:, -rows:], want_dq), (lse[..., -rows:], want_lse)):
        assert difference(a, b.detach()) <= torch.finfo(torch.bfloat16).eps


@pytest.mark.parametrize("name", MASKS)
def test_every_mask_here_has_something_to_see_and_something_to_hide(name: str) -> None:
    """On any machine, so that no case fails on a GPU for reasons of its own."""
    mask, at = MASKS[name]
    low = lower(mask, at, at, HEADS[1], torch.device("cpu"))
    seen = visible(low)
    assert seen.any() and (name == "full" or not seen.all())
    lists = tiles(mask, at, at, HEADS[1], size=(128, 64), transpose=True, device=torch.device("cpu"))
    assert lists.columns == -(-total(at) // 128) and lists.rows == -(-total(at) // 64)


@pytest.mark.parametrize("name", ["causal", "documents of rows"])
def test_the_same_measure_on_a_cpu(name: str) -> None:
    errors = run(Case(name, 16, "float32"), "cpu")
    assert errors.keys() == {"out", "lse", "dq", "dk", "dv"}
    assert all(0 < error <= bound("float32", tensor) for tensor, error in errors.items()), errors
