"""DSP: a factorised video model whose sharded axis is switched between its blocks equals one process."""

from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from cells import difference, meshed
from longspan.parallel.axes import Axes
from longspan.parallel.mesh import Mesh
from world import Worlds

Shape = tuple[int, int, int, int]  # B, T frames, S tokens of a frame, C
SHAPES: list[Shape] = [(2, 6, 12, 8), (2, 5, 7, 8), (1, 7, 2, 8), (1, 1, 5, 8)]


class Block(nn.Module):
    """Attention along dimension 2 of [B, rows, along, C], and an MLP: no row knows of another."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(dim, 3 * dim), nn.Linear(dim, dim)
        self.norm, self.mlp = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.norm(x)).unflatten(-1, (3, 2, -1)).permute(3, 0, 1, 4, 2, 5)
        weights = (q @ k.mT / q.shape[-1] ** 0.5).softmax(-1)
        x = x + self.out((weights @ v).transpose(2, 3).flatten(3))
        y: Tensor = x + F.gelu(self.mlp(x))
        return y


class Factorised(nn.Module):
    """Spatial and temporal blocks by turns. It knows of ranks only that `turn` comes between them."""

    def __init__(self, dim: int, blocks: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dim) for _ in range(blocks))
        self.double()

    def forward(self, x: Tensor, axes: Axes | None, lengths: tuple[int, int]) -> Tensor:
        """x [B, T, S, C], of which this rank holds some frames."""
        for i, block in enumerate(self.blocks):
            if i and axes is not None:
                cut, join = (2, 1) if i % 2 else (1, 2)
                x = axes.switch(x, join=join, cut=cut, length=lengths[join - 1])
            x = block(x) if i % 2 == 0 else block(x.transpose(1, 2)).transpose(1, 2)
        return x


def inputs(shape: Shape) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    x, dout = (torch.randn(shape, generator=draw, dtype=torch.float64) for _ in range(2))
    return x, dout


def pulled(
    model: nn.Module, x: Tensor, axes: Axes | None, dout: Tensor, lengths: tuple[int, int]
) -> list[Tensor]:
    """The output, the gradient of x, and those of the parameters."""
    x = x.clone().requires_grad_()
    out = model(x, axes, lengths)
    out.backward(dout)
    grads = [x.grad, *(p.grad for p in model.parameters())]
    return [out.detach(), *(g for g in grads if g is not None)]


def errors(rank: int, size: int, blocks: int) -> list[float]:
    """Of each shape: the greatest relative difference on this rank, of outputs and of all gradients."""
    axes, found = Axes(meshed(Mesh(head=size))), []
    for shape in SHAPES:
        x, dout = inputs(shape)
        lengths, last = (shape[1], shape[2]), 2 - blocks % 2
        want = pulled(Factorised(8, blocks), x, None, dout, lengths)
        got = pulled(Factorised(8, blocks), axes.shard(x, 1), axes, axes.shard(dout, last), lengths)
        assert len(got) == len(want) == 2 + 8 * blocks
        for grad in got[2:]:
            dist.all_reduce(grad, group=axes.group)
        want[:2] = axes.shard(want[0], last), axes.shard(want[1], 1)
        found.append(max(difference(a, b) for a, b in zip(got, want, strict=True)))
    return found


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("blocks", [2, 3])
def test_a_factorised_model_equals_one_process(size: int, blocks: int, world: Worlds) -> None:
    """Sizes that divide and that do not, frames and tokens fewer than ranks."""
    for found in world(size)(errors, size, blocks):
        assert max(found) < 1e-10, dict(zip(SHAPES, found, strict=True))


def traffic(rank: int, size: int, shape: Shape) -> tuple[int, int, int, bool]:
    """Bytes and messages of one switch, bytes of two backward, and whether there and back changes nothing."""
    axes = Axes(meshed(Mesh(head=size)))
    x = axes.shard(inputs(shape)[0], 1).requires_grad_()
    there = axes.switch(x, join=1, cut=2, length=shape[1])
    assert there.equal(axes.shard(inputs(shape)[0], 2))
    once, messages = sum(axes.traffic.sent.values()), axes.traffic.messages
    again = axes.switch(there, join=-2, cut=-3, length=shape[2])
    axes.traffic.reset()
    again.sum().backward()
    return once, messages, sum(axes.traffic.sent.values()), again.equal(x) and x.grad is not None


def test_a_switch_sends_each_number_once(world: Worlds) -> None:
    """What a rank keeps is not sent; the gradient goes the same way back."""
    shape = (2, 5, 7, 8)
    frames, tokens = [1, 2, 2], [2, 2, 3]
    for rank, (once, messages, back, same) in enumerate(world(3)(traffic, 3, shape)):
        assert once == 2 * frames[rank] * (7 - tokens[rank]) * 8 * 8 and messages == 2 and same
        # and of the second switch's gradient
        assert back == once + 2 * (5 - frames[rank]) * tokens[rank] * 8 * 8


def refused(rank: int, join: int, cut: int) -> str:
    axes = Axes(meshed(Mesh(head=2)))
    assert [b - a for a, b in pairwise((0, 2, 5))] == axes.sizes(5)
    with pytest.raises(ValueError, match="to be cut along") as caught:
        axes.switch(torch.zeros(1, 5, 4, 2), join=join, cut=cut, length=5)
    return str(caught.value)


def test_a_tensor_that_is_no_part_is_refused(world: Worlds) -> None:
    told = world(2)(refused, 1, 2)
    assert told[1] == (
        "rank 1 of 2 holds 5 of 5 along dimension 1, to be cut along 2: it must hold 3, and cut another"
    )
    assert "to be cut along 1" in world(2)(refused, 1, -3)[0]
