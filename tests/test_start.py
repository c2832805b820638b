"""A run that starts from a folder under FSDP: a rank reads only what it holds of the folder's weights."""

import json
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.distributed.tensor import DTensor

import jobs
from longspan.launch.ledger import Ledger
from longspan.models.gpt import GPT
from longspan.models.rope import Rope
from longspan.train import job as job_module
from longspan.train.data.tensorfile import TensorFile
from longspan.train.engine.states import local
from longspan.train.huggingface.config import Settings, config_of
from longspan.train.huggingface.folder import Folder, Weight, name_of, write
from longspan.train.job import build
from world import Worlds

# such that nothing divides the vocabulary
SIZES: dict[str, Any] = {"dim": 64, "layers": 3, "heads": 4, "kv_heads": 2, "hidden": 112}
VOCAB = 1027
SLOW = pytest.mark.slow
SMALL = (
    *(f"model.{name}={value}" for name, value in SIZES.items()), "model.qk_norm=false", "model.eps=1e-6",
    "engine=fsdp", "data=mock", f"data.vocab={VOCAB}", "data.context=64", "train.steps=3",
)  # fmt: skip


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights in several files, where the output layer is the embedding and where it is not."""
    found = {}
    for name in ("tied", "untied"):
        torch.manual_seed(3)
        model = GPT(VOCAB, **SIZES, tied=name == "tied", eps=1e-6, rope=Rope(), init_std=0.05)
        config = config_of(Settings.of_model(model), context=64, dtype="float32")
        weights = [
            Weight(name_of(own), tuple(p.shape), p.dtype, p.clone) for own, p in model.named_parameters()
        ]
        found[name] = tmp_path_factory.mktemp("start") / name
        assert len(write(found[name], config, weights, shard_gb=2e-4, beside={}, texts={})) > 2
    return found


def overrides(folder: Path, *more: str) -> tuple[str, ...]:
    tied = json.loads((folder / "config.json").read_text())["tie_word_embeddings"]
    return (*SMALL, f"init.path={folder}", f"model.tied={str(tied).lower()}", *more)


class Storage(Ledger):
    """Counts only what has storage."""

    def see(self, x: Tensor, category: str) -> None:
        if not x.is_meta:
            super().see(x, category)


@dataclass(frozen=True)
class Started:
    """wrong: weights that are not the folder's. Bytes: read of weights, held at most by tensors until the run
    could begin, of the weights of this rank, of all weights, of the largest one.
    """

    wrong: list[str]
    read: int
    peak: int
    held: int
    whole: int
    largest: int


def started(rank: int, cfg: DictConfig, folder: Path, late: bool = True) -> Started:
    """late: as it is; else as it was, a whole model on each rank before the engine shards it."""
    read, plain = list[int](), TensorFile.part

    def part(file: TensorFile, name: str, box: tuple[slice, ...]) -> Tensor:
        found = plain(file, name, box)
        read.append(found.nbytes)
        return found

    with jobs.joined(rank) as device:
        with (
            patch.object(TensorFile, "part", part),
            patch.object(job_module, "assembled", partial(job_module.assembled, whole=not late)),
            Storage() as ledger,
        ):
            job = build(cfg, jobs.launch_of(rank), device)
        source = Folder(folder)
        want = {own: source.tensor(name_of(own)) for own, _ in job.model.named_parameters()}
        sizes = [x.nbytes for x in want.values()]
        wrong = [own for own, p in job.model.named_parameters() if not torch.equal(full(p), want[own])]
        held = sum(local(p).nbytes for p in job.model.parameters())
        return Started(wrong, sum(read), ledger.most, held, sum(sizes), max(sizes))


def full(p: Tensor) -> Tensor:
    return p.full_tensor() if isinstance(p, DTensor) else p


@pytest.mark.parametrize(
    ("size", "kind", "more"),
    [
        (2, "tied", jobs.ring()),
        pytest.param(2, "untied", ("parallel=single", "parallel.mesh.tp=2"), marks=SLOW),
        pytest.param(4, "tied", (*jobs.ring(), "parallel.mesh.tp=2"), marks=SLOW),
        pytest.param(4, "untied", (*jobs.ring(), "engine.replicate=true", "parallel.mesh.dp=2"), marks=SLOW),
        pytest.param(3, "untied", jobs.ring(), marks=SLOW),
    ],
    ids=["fsdp", "tp", "fsdp x tp", "hsdp", "three"],
)
def test_each_rank_reads_and_holds_its_part_only(
    size: int, kind: str, more: tuple[str, ...], folders: dict[str, Path], world: Worlds
) -> None:
    folder = folders[kind]
    for found in world(size)(started, jobs.config(*overrides(folder, *more)), folder):
        assert found.wrong == []
        # what is cut to pieces of one size, and norms, which tensor parallelism leaves whole
        assert found.held <= found.whole / (2 if "engine.replicate=true" in more else size) + 2**13
        assert found.read == found.held
        assert found.peak <= found.held + found.largest + 2**14 < found.whole + 2**14


@SLOW
def test_what_holds_all_is_seen_to_do_so(folders: dict[str, Path], world: Worlds) -> None:
    cfg = jobs.config(*overrides(folders["tied"], *jobs.ring()))
    for found in world(2)(started, cfg, folders["tied"], False):
        assert found.wrong == [] and found.read == found.whole
        assert found.peak >= found.whole + found.largest > found.held + found.largest + 2**14


@SLOW
@pytest.mark.parametrize(
    ("kind", "more"),
    [
        ("tied", jobs.ring()),
        ("untied", ("parallel=single", "parallel.mesh.tp=2")),
        ("tied", (*jobs.ring(), "engine.offload=true")),
        ("untied", (*jobs.ring(), "lora.rank=3")),
    ],
    ids=["fsdp", "tp", "offload", "lora"],
)
def test_a_run_is_the_one_of_whole_weights(
    kind: str, more: tuple[str, ...], folders: dict[str, Path], world: Worlds, tmp_path: Path
) -> None:
    folder = folders[kind]
    alone = overrides(folder, "engine=ddp", "parallel=single", *(x for x in more if "lora" in x))
    one = world(1)(jobs.run, jobs.config(*alone), tmp_path / "one")
    two = world(2)(jobs.run, jobs.config(*overrides(folder, *more)), tmp_path / "two")
    both = (jobs.values(ran.rows, "loss", "grad_norm") for ran in (two[0], one[0]))
    assert jobs.furthest(*both) < 1e-5
    jobs.assert_same_tokens(two[0].losses, one[0].losses)
