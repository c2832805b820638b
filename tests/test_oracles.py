"""Against other people's programs: DeepSpeed's Ulysses, and where Megatron places tokens for its ring."""

import importlib.util
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from cells import Cell, build, difference, inputs, local
from longspan.kernels.mask import Causal
from longspan.kernels.span import positions as span_positions
from longspan.parallel.layout import shard
from longspan.parallel.placement import zigzag
from world import Worlds


def needs(package: str, extra: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(package) is None
    return pytest.mark.skipif(missing, reason=f"{package} is not installed: pip install 'longspan[{extra}]'")


def causal(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own attention: q [B, N, Hq, D], k, v [B, N, Hkv, D] -> [B, N, Hq, D]."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)


def against_deepspeed(rank: int, size: int, heads: list[tuple[int, int]]) -> list[dict[str, float]]:
    """How far our Ulysses is from DeepSpeed's: of out and of each gradient."""
    import deepspeed.comm
    import deepspeed.ops
    from deepspeed.sequence.layer import DistributedAttention

    # else it compiles an operator for a minute
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.comm.init_distributed("gloo", auto_mpi_discovery=False, verbose=False)
    found = []
    for each in heads:
        cell = Cell("ulysses", Causal(), each, 48, batch=2)
        layout = build(cell.layout, size)
        placement = layout.place(cell.length, cell.mask)
        given = inputs(cell)
        # theirs has no lse
        given[4].zero_()
        ours = local(layout, cell, placement, given)
        q, k, v, dout = (shard(layout, x, placement, 1) for x in given[:4])
        theirs = [x.clone().requires_grad_() for x in (q, k, v)]
        attend = DistributedAttention(causal, dist.group.WORLD, scatter_idx=2, gather_idx=1)
        out = attend(*theirs, 0)
        out.backward(dout)
        found.append({"out": difference(ours["out"], out.detach())})
        for name, x in zip(("dq", "dk", "dv"), theirs, strict=True):
            assert x.grad is not None
            found[-1][name] = difference(ours[name], x.grad)
    return found


@needs("deepspeed", "deepspeed")
@pytest.mark.parametrize(("size", "heads"), [(2, [(4, 4), (8, 2), (4, 2)]), (4, [(4, 4), (8, 4)])])
def test_ulysses_is_deepspeeds(world: Worlds, size: int, heads: list[tuple[int, int]]) -> None:
    for found in world(size)(against_deepspeed, size, heads):
        assert all(max(errors.values()) < 1e-10 for errors in found), found


def megatrons(rank: int, size: int, length: int) -> list[int]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it would rather have than us
        from megatron.core.utils import get_batch_on_this_cp_rank

    batch = {"tokens": torch.arange(length)[None]}
    return get_batch_on_this_cp_rank(batch, cp_group=dist.group.WORLD)["tokens"].flatten().tolist()


@needs("megatron", "megatron")
@pytest.mark.parametrize("size", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_zigzag_is_megatrons(world: Worlds, size: int) -> None:
    found = world(size)(megatrons, size, 48)
    assert found == [span_positions(spans).tolist() for spans in zigzag(48, size).spans_by_rank]
