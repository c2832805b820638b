"""Training: the same losses, per token too, on every layout and however a step is cut."""

from dataclasses import replace
from math import cos, pi
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from omegaconf import DictConfig
from torch import Tensor

from corpora import write_documents
from jobs import (
    EXACT,
    STEPS,
    Once,
    Row,
    assert_same,
    assert_same_tokens,
    config,
    furthest,
    launch_of,
    probe,
    ring,
    together,
    values,
)
from longspan.kernels.mask import Mask
from longspan.models.gpt import GPT
from longspan.parallel.layout import Layout
from longspan.parallel.placement import Placement
from longspan.train.batch import Shard, Tokens, collate
from longspan.train.config import made
from longspan.train.data.sample import IGNORE
from longspan.train.job import build, build_model, processes
from world import RankFailed, Worlds

CONF = Path(__file__).resolve().parents[1] / "conf"
LAYOUTS = sorted({path.stem for path in (CONF / "parallel").glob("*.yaml")} - {"single", "ring"})
# masks that these layouts are made for, at the size of the test
MASKS = {
    "s2": ("mask=s2", "mask.left.block=16", "mask.left.local=2", "mask.left.stride=2"),
    "star": ("mask=star", "mask.left.block=32", "mask.left.anchor=32", "mask.left.context=192"),
    "mixed": ("mask=mixed", "mask.left.every=2", *(f"mask.left.most.{x}" for x in ("block=16", "local=2"))),
    "mixed_heads": ("mask=streaming_heads", "mask.left.right.left.left=20"),
}
# so that the second of two layers differs from the first
SETTINGS = {"mixed": ("parallel.layout.every=2", "parallel.layout.most.block=16")}
# cells of the first test that are run by `make test-all` alone
MORE = {
    (2, "contiguous", "unpacked"), (4, "contiguous", "unpacked"), (3, "zigzag", "unpacked"),
    (4, "zigzag", "unpacked"), (3, "contiguous", "packed"), (4, "contiguous", "packed"),
    (3, "zigzag", "packed"),
}  # fmt: skip
CELLS = [
    pytest.param(
        size, placement, pack, marks=[pytest.mark.slow] if (size, placement, pack) in MORE else [],
        id=f"{placement} {size} {pack}",
    )
    for pack in ("packed", "unpacked") for placement in ("contiguous", "zigzag") for size in (2, 3, 4)
]  # fmt: skip


@pytest.mark.parametrize(("size", "placement", "pack"), CELLS)
def test_a_ring_trains_as_one_process(once: Once, size: int, placement: str, pack: str) -> None:
    packing = f"data.pack={str(pack == 'packed').lower()}"
    assert_same(once(size, *ring(placement, packing)), once(1, "parallel=single", packing))


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_every_layout_trains_as_one_process(once: Once, parallel: str) -> None:
    short = (*MASKS.get(parallel, ("mask=causal",)), "train.steps=5")
    if parallel == "star":
        # which does not serve several documents in a sequence
        with pytest.raises(RankFailed, match="Unsupported: parallel=star: under .*Documents"):
            once(2, "parallel=star", *short)
        short += ("data=needle", "data.context=256", "data.span=8")
    size = 4 if parallel == "usp" else 2
    settings = SETTINGS.get(parallel, ())
    assert_same(once(size, f"parallel={parallel}", *settings, *short), once(1, "parallel=single", *short))


@pytest.mark.parametrize(
    ("size", "overrides"),
    [
        (1, ("parallel=single", "train.accumulate=2")),
        (2, ring("zigzag", "parallel.mesh.dp=2", "parallel.mesh.ring=1")),
        (4, ring("zigzag", "parallel.mesh.dp=2", "parallel.mesh.ring=2")),
        (2, ring("contiguous", "train.accumulate=2")),
    ],
    ids=["accumulate", "dp2 ring1", "dp2 ring2", "ring2 accumulate"],
)
def test_a_step_is_the_same_however_it_is_cut(once: Once, size: int, overrides: tuple[str, ...]) -> None:
    one = once(1, "parallel=single", "data.pack=true")
    assert_same(once(size, *overrides, "train.micro_batch=1"), one)


def test_recomputed_activations_change_nothing(once: Once) -> None:
    kept, again = once(2, *ring("zigzag", "data.pack=true")), once(2, *ring("zigzag", "memory=long"))
    assert values(again[0].rows, *EXACT).equal(values(kept[0].rows, *EXACT))
    assert again[0].losses.equal(kept[0].losses)


def test_bfloat16_trains_like_float32(once: Once) -> None:
    exact = values(once(2, *ring("zigzag", "data.pack=true"))[0].rows, "loss")
    losses = values(once(2, *ring("zigzag", "train.precision=bfloat16"))[0].rows, "loss")
    assert 1e-5 < furthest(losses, exact) < 1e-2


def plain(cfg: DictConfig) -> list[Row]:
    """The same training with nothing but torch: dense masks, its own attention, loss and AdamW."""
    data = made(cfg.data)
    model = build_model(cfg, data, made(cfg.mask))
    assert isinstance(model, GPT)
    flat = [p for n, p in model.named_parameters() if p.ndim < 2 or n == "embed.weight"]
    deep = [p for n, p in model.named_parameters() if p.ndim == 2 and n != "embed.weight"]
    groups = [{"params": deep, "weight_decay": 0.1}, {"params": flat, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=(0.9, 0.95), eps=1e-8)
    rows = []
    for step in range(cfg.train.steps):
        batch = collate([data.sample(2 * step + i) for i in range(2)])
        at = torch.arange(data.context)
        document = torch.stack([torch.bucketize(at, torch.tensor(o), right=True) for o in batch.offsets])
        seen = (document[:, :, None] == document[:, None, :]) & (at[:, None] >= at)

        def attend(q: Tensor, k: Tensor, v: Tensor, mask: Mask, seen: Tensor = seen) -> Tensor:
            q, k, v = (x.transpose(1, 2) for x in (q, k, v))
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=seen[:, None], enable_gqa=True)
            return out.transpose(1, 2)

        logits = model.head(model(batch.tokens, at, attend))
        loss = F.cross_entropy(logits.flatten(0, 1), batch.labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        lr = 2e-3 * ((step + 1) / 5 if step < 5 else 0.1 + 0.9 * (1 + cos(pi * (step - 5) / 15)) / 2)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        rows.append({"step": step + 1, "loss": loss.item(), "grad_norm": float(norm), "lr": lr})
    return rows


def test_training_is_what_plain_torch_does(once: Once, data_cache: str) -> None:
    want = plain(config(data_cache))
    got = once(1, "parallel=single", "data.pack=true")[0].rows
    assert len(want) == len(got) == STEPS
    for name, tolerance in (("step", 0), ("lr", 1e-12), ("loss", 2e-6), ("grad_norm", 2e-5)):
        assert furthest(values(got, name), values(want, name)) <= tolerance
    assert got[-1]["loss"] < got[0]["loss"] - 0.5


@pytest.mark.parametrize(
    ("size", "layout"),
    [
        (3, ring("contiguous")),
        pytest.param(2, ring("zigzag"), marks=pytest.mark.slow),
        pytest.param(
            4,
            ring("contiguous", "parallel.mesh.dp=2", "parallel.mesh.ring=2", "train.micro_batch=1"),
            marks=pytest.mark.slow,
        ),
        pytest.param(
            3, ("parallel=single", "train.micro_batch=2", "train.accumulate=1"), marks=pytest.mark.slow
        ),
    ],
    ids=["ring3", "ring2", "dp2 ring2", "dp3"],
)
def test_ranks_with_different_numbers_of_valid_tokens(
    once: Once, data_cache: str, tmp_path_factory: pytest.TempPathFactory, size: int, layout: tuple[str, ...]
) -> None:
    corpus = tmp_path_factory.getbasetemp() / "corpus"
    if not corpus.exists():
        write_documents(corpus)
    data = ("data=text", f"data.path={corpus}", "data.context=61", "data.pack=false", "data.held_out=0.2")
    short = (*data, "train.steps=6", "optim.warmup=2")
    sequences = 6 if "parallel=single" in layout else 2
    one = once(1, "parallel=single", *short, f"train.micro_batch={sequences}")
    # else the test shows nothing
    labels = torch.stack(
        [torch.from_numpy(made(config(data_cache, *short).data).sample(i).labels) for i in range(16)]
    )
    counts = torch.stack([(part != IGNORE).sum(1) for part in labels.tensor_split(3, 1)])
    assert (counts[0].gt(0) & counts[2].eq(0)).any() and counts[2].gt(0).any()
    got = once(size, *layout, *short)
    assert together(got) == together(one)
    for ran in got:
        assert furthest(values(ran.rows, "loss", "valid"), values(one[0].rows, "loss", "valid")) < 2e-6
        assert furthest(values(ran.rows, "grad_norm"), values(one[0].rows, "grad_norm")) < 1e-5
        assert_same_tokens(ran.losses, one[0].losses)


held = Tokens.held


def labelled_too_late(batch: Tokens, layout: Layout, placement: Placement, device: torch.device) -> Shard:
    """`held` with the fault that design forbids: each rank shifts the tokens that it holds."""
    part = held(batch, layout, placement, device)
    labels = torch.cat((part.tokens[:, 1:], torch.full_like(part.tokens[:, :1], IGNORE)), 1)
    return replace(part, labels=labels)


def first_losses(rank: int, cfg: DictConfig, fault: bool) -> Tensor:
    """`probe` before any training."""
    launch = launch_of(rank)
    with processes(launch, "cpu", 60.0) as device:
        job = build(cfg, launch, device)
        if not fault:
            return probe(job)
        with patch.object(Tokens, "held", labelled_too_late):
            return probe(job)


def test_a_label_that_is_lost_at_a_shard_border_is_seen(world: Worlds, data_cache: str) -> None:
    want = world(1)(first_losses, config(data_cache, "parallel=single"), False)[0]
    cfg = config(data_cache, *ring("contiguous"))
    right, wrong = (world(2)(first_losses, cfg, fault)[0] for fault in (False, True))
    assert_same_tokens(right, want)
    with pytest.raises(AssertionError, match="token 127 is off by"):
        assert_same_tokens(wrong[:, :-1], want[:, :-1])
    # a mean hardly moves
    assert furthest(wrong.mean(), want.mean()) < 0.02
