"""Tensor parallelism: a training run is that of one process, checkpoints go on with other ranks, and what
cannot be split is refused.
"""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

from benchmarks.memory import dry
from jobs import Once, assert_same, config, gone_on, launch_of, ring
from longspan.kernels.loss import Rows, likeliest, linear_cross_entropy, token_losses
from longspan.kernels.mask import Unsupported
from longspan.launch.dryrun import estimate
from longspan.parallel.mesh import Heads, Mesh
from longspan.train.engine.tensor_parallel import rows_of
from longspan.train.job import build, processes
from longspan.train.loop import backward, micro_batches
from world import Worlds

TEN = "train.steps=10"
TP = ("engine=fsdp", "parallel.mesh.tp=2")
RING = (*TP, *ring("zigzag"), "parallel.mesh.ring=2")
ALONE = ("engine=ddp", "parallel=single")


@pytest.mark.parametrize(
    ("size", "overrides", "model"),
    [
        pytest.param(2, (*TP, "parallel=single"), (), marks=pytest.mark.slow),
        (4, RING, ("mask=s2",)),
        pytest.param(
            4, (*TP, "parallel=single", "parallel.mesh.dp=2", "engine.replicate=true", "train.micro_batch=1"),
            (), marks=pytest.mark.slow,
        ),
    ],
    ids=["alone", "heads of their own", "hsdp"],
)  # fmt: skip
def test_layers_that_ranks_share_train_as_one_process(
    once: Once, size: int, overrides: tuple[str, ...], model: tuple[str, ...]
) -> None:
    one = once(1, "parallel=single", "data.pack=true", TEN, *model)
    assert_same(once(size, *overrides, TEN, *model), one)


@pytest.mark.slow
def test_a_checkpoint_goes_on_with_other_ranks(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path
) -> None:
    then = config(data_cache, TEN, *TP, "parallel=single")
    ran = gone_on(world, tmp_path / "checkpoints", (4, config(data_cache, TEN, *RING)), (2, then))
    assert_same(ran, once(1, "parallel=single", "data.pack=true", TEN), since=5)


def second_step(rank: int, cfg: DictConfig) -> tuple[float, dict[str, Tensor]]:
    """This rank's share of the loss, and the whole gradients, after a step in which no weight stays as it was
    made.
    """
    with processes(launch_of(rank), "cpu", 60.0) as device:
        job = build(cfg, launch_of(rank), device)
        for step in range(2):
            batches = micro_batches(job, step * job.global_batch, step)
            loss = backward(job, batches, float(sum(b.valid for b in batches)))
            if not step:
                job.engine.step(1e-3, 0.0)
        grads = {name: p.grad for name, p in job.model.named_parameters() if p.grad is not None}
        return float(loss), {
            name: g.full_tensor() if isinstance(g, DTensor) else g for name, g in grads.items()
        }


@pytest.mark.parametrize(
    ("split", "model"),
    [
        (RING, ("model.tied=false", "model.bias=qkvo", "model.predecessor=true", "data.context=251")),
        pytest.param(
            RING,
            ("model.bias=qkv", "model.dim=34", "model.head_dim=8", "memory=longest", "memory.mlp_tile=9"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            (*TP, "parallel=ulysses", "parallel.mesh.head=2", "train.micro_batch=1", "train.accumulate=2"),
            ("memory.recompute=keep_attention", "objective.z_loss=1e-3", "objective.chunk=60"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            ("engine=fsdp", "parallel.mesh.tp=4", "parallel=single"),
            ("model.kv_heads=4", "data.context=5"),
            marks=pytest.mark.slow,
        ),
    ],
    ids=["all biases", "long", "ulysses", "few tokens"],
)  # fmt: skip
def test_gradients_of_layers_that_ranks_share_are_those_of_one_process(
    world: Worlds, data_cache: str, split: tuple[str, ...], model: tuple[str, ...]
) -> None:
    plain = tuple(word for word in model if not word.startswith("memory"))
    (want, grads), *_ = world(1)(second_step, config(data_cache, *ALONE, *plain))
    got = world(4)(second_step, config(data_cache, *split, *model))
    assert sum(loss for loss, _ in got) == pytest.approx(want, rel=2e-6)
    for _, found in got:
        assert found.keys() == grads.keys()
        for name, grad in grads.items():
            assert (found[name] - grad).norm() <= 1e-5 * grad.norm() + 1e-9, name


def whole_and_shared(rank: int, z_loss: float) -> list[tuple[Tensor, ...]]:
    """Loss, its gradients, the losses of tokens and the likeliest rows: with the whole weight, and with ranks
    that hold 11 rows of it together.
    """
    x, weight = torch.randn(9, 6, dtype=torch.float64), 3 * torch.randn(11, 6, dtype=torch.float64)
    # equal logits of rows that different ranks hold
    weight[10] = weight[2]
    labels = torch.tensor([0, 10, -100, 5, 6, 2, 3, -100, 9])
    size = dist.get_world_size()
    first, count = rows_of(11, size, rank)

    def reduced(how: dist.ReduceOp.RedOpType) -> Callable[[Tensor], Tensor]:
        return lambda x: (dist.all_reduce(x, how), x)[1]

    found = list[tuple[Tensor, ...]]()
    rows = Rows(first, 11, reduced(dist.ReduceOp.MAX), reduced(dist.ReduceOp.SUM))
    for own, here in ((weight, None), (weight[first : first + count], rows)):
        own, given = own.clone().requires_grad_(), x.clone().requires_grad_()
        loss = linear_cross_entropy(
            given, own, labels, denominator=7, chunk=4, z_loss=z_loss,
            backend="own" if here is None else "auto", rows=here,
        )  # fmt: skip
        loss.backward()
        assert given.grad is not None and own.grad is not None
        dw = own.grad[first : first + count] if here is None else own.grad
        if here is not None:
            dist.all_reduce(given.grad)
        each = token_losses(given, own, labels, chunk=5, rows=here)
        found.append((loss.detach(), given.grad, dw, each, likeliest(x, own.detach(), rows=here)))
    return found


@pytest.mark.parametrize("z_loss", [0.0, 0.01])
def test_a_vocabulary_that_ranks_share_gives_the_loss_of_the_whole(world: Worlds, z_loss: float) -> None:
    for whole, part in world(4)(whole_and_shared, z_loss):
        torch.testing.assert_close(part, whole, rtol=1e-12, atol=1e-13)


def test_a_forced_backend_refuses_rows_and_a_label_beyond_all_of_them_is_refused() -> None:
    x, weight = torch.zeros(2, 3), torch.zeros(4, 3)
    rows = Rows(4, 8, lambda x: x, lambda x: x)
    labels = torch.tensor([7, 8])
    with pytest.raises(Unsupported, match="backend='torch': ranks hold the weight together .*'own'"):
        linear_cross_entropy(x, weight, labels[:1].expand(2), denominator=1, backend="torch", rows=rows)
    with pytest.raises(ValueError, match="label 8 is neither a row of weight \\(0 to 7\\)"):
        linear_cross_entropy(x, weight, labels, denominator=1, rows=rows)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("parallel.mesh.tp=4",), "tp is 4, and model.kv_heads 2: tp must divide it; 1, 2 would do"),
        (("parallel.mesh.tp=8",), "tp is 8, and model.heads 4: tp must divide it; 1, 2 would do"),
        (("parallel.mesh.tp=2", "model.hidden=97"), "tp is 2, and model.hidden 97: .*; 1 would do"),
        (("parallel.mesh.tp=4", "model.kv_heads=4", "data.vocab=5"), "model.vocab 5: each rank must hold"),
        (("parallel.mesh.tp=2", "lora.rank=2"), "tp is 2; it splits plain layers, .* set lora.rank=0"),
        (("parallel.mesh.tp=2", "memory.head_chunks=2"), "splits the heads .*: set memory.head_chunks=1"),
        (("parallel.mesh.tp=2", "engine=ddp"), "engine=ddp holds whole weights, .* take engine=fsdp"),
        (
            ("parallel.mesh.tp=2", "model.bias=qkv", "parallel.mesh.dp=3", "model.head_dim=2"),
            "tp is 2, and 3 ranks shard what each has of a weight .*: they can do so evenly only",
        ),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_refused(overrides: tuple[str, ...], message: str) -> None:
    world = 6 if "parallel.mesh.dp=3" in overrides else 8
    given = ("data=mock", "data.vocab=64", "data.context=64", "parallel=single", "engine=fsdp", *overrides)
    with pytest.raises(ValueError, match=f"parallel.mesh.{message}|{message}"):
        estimate(dry(("experiment=tiny", "track=none", *given, f"world={world}")))


def test_a_dry_run_counts_layers_that_ranks_share() -> None:
    given = ("experiment=tiny", "track=none", "data=mock", "data.vocab=64", "data.context=256", "engine=fsdp")
    half, whole = (
        estimate(dry((*given, "parallel=single", f"world={tp}", f"parallel.mesh.tp={tp}"))) for tp in (2, 1)
    )
    assert half.mesh["tp"] == 2 and half.parameters == whole.parameters
    assert half.tokens == whole.tokens and half.flops == whole.flops
    assert half.peak["optimizer"] == pytest.approx(whole.peak["optimizer"] / 2, rel=0.05)
    sent = {m.kind: m.bytes for m in half.sent}
    # 2 sequences of 256 tokens of 32 numbers: into attention and MLP of 2 layers and out of the last norm;
    # back where tokens were cut and where sums were
    shard = 2 * 256 * 32 * 4 // 2
    assert sent["all-gather"] == shard * (5 + 5)
    assert sent["reduce-scatter"] == shard * (4 + 5)


def test_head_auto_deals_out_the_heads_that_tensor_parallelism_leaves() -> None:
    auto = Mesh(ring="auto", head="auto", tp=2)
    assert auto.degrees(32, 16, Heads(32, 8))["head"] == 4
    assert Mesh(ring="auto", head="auto").degrees(32, 16, Heads(32, 8))["head"] == 8
