"""engine.optimizer=distributed of engine=megatron: Megatron's DDP, distributed optimizer and
dist_checkpointing, on gloo ranks through megatron_shim.py, which is in processes of its own.
"""

import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from traceback import StackSummary
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.checkpoint import CheckpointException

from jobs import Once, assert_same, assert_same_tokens, config, furthest, ring, run, values
from longspan.train.engine import megatron_native
from longspan.train.engine.megatron import Megatron
from longspan.train.engine.megatron_distributed import needs_cuda, settings
from longspan.train.optim import Optim
from longspan.train.singly import singly
from test_oracles import needs
from world import Worlds

pytestmark = needs("megatron", "megatron-core")
SLOW = pytest.mark.slow
TEN = "train.steps=10"
ONE = ("parallel=single", "data.pack=true")
TP = ("parallel=single", "parallel.mesh.tp=2")
DP = (*ONE, "parallel.mesh.dp=2", "train.micro_batch=1")
UNTIED = ("model.bias=qkv", "model.tied=false")
# two micro batches of each rank in a step, and gradients whose norm is greater than this
CLIPPED = ("train.clip=0.2",)
HALF = 5
# name -> overrides; those that stop leave a checkpoint for another engine, those that go on find one
TRAINED: dict[int, dict[str, tuple[str, ...]]] = {
    2: {
        "dp 2": DP,
        "ring 2": ring("zigzag"),
        "tp 2": TP,
        "clipped": (*DP, "train.accumulate=2", *CLIPPED),
        "average": (*ring("zigzag"), "train.ema=0.9"),
        "divided": DP,
        "stops, ring 2": ring("zigzag"),
        "stops, tp 2": (*TP, *UNTIED),
        "goes on, ring 2": ring("zigzag"),
        "goes on, tp 2": TP,
    },
    4: {
        "tp 2 x ring 2": (*ring("zigzag"), "parallel.mesh.tp=2"),
        "stops, dp 2 x tp 2": (*DP, "parallel.mesh.tp=2"),
        "dp 2 x ring 2": (*ring("zigzag"), "parallel.mesh.dp=2", "train.micro_batch=1"),
    },
}
NATIVE: dict[int, dict[str, tuple[str, ...]]] = {
    2: {"native, dp 2": DP},
    4: {"native, dp 2 x tp 2": (*DP, "parallel.mesh.tp=2", *UNTIED)},
}
Seen = Callable[[int], tuple[Path, list[dict[str, Any]]]]


def cases(size: int, cache: str) -> list[dict[str, Any]]:
    """What the child of `size` ranks runs."""
    own = ("engine=megatron", "engine.optimizer=distributed", cache)
    trained = [
        {
            "kind": "trained", "name": name, "folder": slug(name), "words": [*own, TEN, *words],
            "average": name == "divided",
            "stop": HALF if name.startswith("stops") else None,
        }
        for name, words in TRAINED[size].items()
    ]  # fmt: skip
    native = [
        {"kind": "native", "name": name, "folder": slug(name), "words": [*own, "train.steps=3", *words]}
        for name, words in NATIVE[size].items()
    ]
    words = DP if size == 2 else (*DP, "parallel.mesh.tp=2")
    poisoned = {"kind": "poisoned", "name": "poisoned", "words": [*own, TEN, *words]}
    return [*trained, *native, poisoned]


def slug(name: str) -> str:
    return re.sub(r"\W+", "-", name)


@pytest.fixture(scope="module")
def seen(world: Worlds, data_cache: str, tmp_path_factory: pytest.TempPathFactory) -> Seen:
    """What each rank of the child saw, by rank, and the folder with its checkpoints; each size runs once."""
    found: dict[int, tuple[Path, list[dict[str, Any]]]] = {}

    def child(size: int) -> tuple[Path, list[dict[str, Any]]]:
        if size not in found:
            folder = tmp_path_factory.mktemp(f"child-{size}")
            started(world, data_cache, folder, [n for n in TRAINED[size] if n.startswith("goes on")])
            (folder / "cases.json").write_text(json.dumps(cases(size, data_cache)))
            script = Path(__file__).with_name("megatron_child.py")
            words = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={size}"]
            command = [sys.executable, *words, str(script), str(folder)]
            env = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
            done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=500)
            assert done.returncode == 0, done.stderr[-8000:]
            ranks = [pickle.loads((folder / f"rank-{rank}").read_bytes()) for rank in range(size)]
            found[size] = folder, ranks
        return found[size]

    return child


def started(world: Worlds, cache: str, folder: Path, names: list[str]) -> None:
    """Checkpoints of half a run under engine=ddp, in a folder of each name."""
    if names:
        world(1)(run, config(cache, *ONE, TEN), folder / slug(names[0]), HALF)
    for name in names[1:]:
        shutil.copytree(folder / slug(names[0]), folder / slug(name))


@SLOW
@pytest.mark.parametrize(
    ("size", "name"),
    [(size, name) for size in TRAINED for name in TRAINED[size] if "stops" not in name and name != "divided"],
)
def test_it_trains_as_one_process(seen: Seen, once: Once, size: int, name: str) -> None:
    got = [rank[name]["ran"] for rank in seen(size)[1]]
    if name == "clipped":
        want = once(1, *ONE, TEN, "train.accumulate=2", *CLIPPED)
        assert float(values(want[0].rows, "grad_norm").min()) > 0.2
        for ran in got:
            for value, most in (("loss", 2e-6), ("grad_norm", 1e-5)):
                assert furthest(values(ran.rows, value), values(want[0].rows, value)) < most
            assert_same_tokens(ran.losses, want[0].losses)
        return
    same = [word for word in TRAINED[size][name] if word.startswith("train.ema")]
    assert_same(got, once(1, *ONE, TEN, *same), since=HALF if name.startswith("goes on") else 0)


@SLOW
def test_an_average_in_the_place_of_the_sum_is_seen(seen: Seen, once: Once) -> None:
    got = [rank["divided"]["ran"] for rank in seen(2)[1]]
    want = once(1, *ONE, TEN)
    first = values(got[0].rows, "grad_norm")[0] / values(want[0].rows, "grad_norm")[0]
    assert abs(float(first) - 0.5) < 1e-5
    with pytest.raises(AssertionError):
        assert_same(got, want)


@SLOW
@pytest.mark.parametrize(("size", "name"), [(size, name) for size in TRAINED for name in TRAINED[size]])
def test_each_rank_keeps_a_part_of_the_moments(seen: Seen, size: int, name: str) -> None:
    tp = 2 if "tp 2" in name else 1
    share = size // tp
    ranks = [rank[name] for rank in seen(size)[1]]
    # all have what tensor parallelism leaves them; of that the ranks of dp x context each update a stretch
    for first in range(tp):
        own = ranks[first::tp]
        assert sum(rank["kept"] for rank in own) == own[0]["has"]
        for rank in own:
            # a bucket's end is filled up to 128, and each parameter's to 64
            assert abs(rank["kept"] - rank["has"] / share) < 0.05 * rank["has"]


@SLOW
@pytest.mark.parametrize("size", [2, 4])
def test_a_loss_that_is_not_finite_changes_nothing(seen: Seen, size: int) -> None:
    for rank in seen(size)[1]:
        good, bad, then = rank["poisoned"]["norms"]
        assert math.isfinite(good) and math.isfinite(then) and not math.isfinite(bad)
        assert rank["poisoned"]["changed"] == []


@SLOW
@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_keeps_a_part_of_a_checkpoint(seen: Seen, size: int) -> None:
    """Norms are whole in all ranks of tp."""
    whole = seen(2)[1][0]["dp 2"]["has"]
    for rank in seen(size)[1]:
        assert abs(rank["poisoned"]["rows"] * size / whole - 1) < 0.05


@SLOW
@pytest.mark.parametrize(
    ("size", "name", "after"),
    [
        (2, "stops, ring 2", ("engine=ddp", *ONE)),
        (2, "stops, tp 2", ("engine=ddp", *ONE, *UNTIED)),
        (4, "stops, dp 2 x tp 2", ("engine=megatron", *ring("zigzag"))),
    ],
)
def test_its_checkpoint_goes_on_under_another_engine(
    seen: Seen, world: Worlds, once: Once, data_cache: str, tmp_path: Path, size: int, name: str,
    after: tuple[str, ...],
) -> None:  # fmt: skip
    shutil.copytree(seen(size)[0] / slug(name), tmp_path / "checkpoints")
    ranks = 1 if "engine=ddp" in after else 2
    ran = world(ranks)(run, config(data_cache, TEN, *after), tmp_path / "checkpoints")
    assert_same(ran, once(1, *ONE, TEN, *(UNTIED if UNTIED[0] in after else ())), since=HALF)


@SLOW
@pytest.mark.parametrize(("size", "name"), [(size, name) for size in NATIVE for name in NATIVE[size]])
def test_its_own_checkpoint_is_read_by_a_plain_gpt_model(seen: Seen, size: int, name: str) -> None:
    for rank in seen(size)[1]:
        told = rank[name]
        assert told["model"] == [] and told["job"] == []
        assert told["names"] >= 15 and told["tensors"] >= 60 and told["iteration"] == 3


def test_a_cpu_is_refused() -> None:
    with pytest.raises(
        ValueError, match="engine.optimizer is distributed, and device cpu: .* set engine.opt"
    ):
        needs_cuda("cpu")
    needs_cuda("cuda")


def test_what_it_cannot_be_is_refused() -> None:
    model = torch.nn.Linear(2, 2)

    def built(kind: Callable[..., torch.optim.Optimizer], **said: Any) -> torch.optim.Optimizer:
        return Optim(lambda groups, lr: kind(groups, lr=lr, **said), 1e-3).build(model)

    for optimizer, message in (
        (built(torch.optim.SGD), "engine.optimizer is distributed, which is AdamW, and the job's is SGD"),
        (built(torch.optim.Adam), "and the job's is Adam: set optim.optimizer to torch.optim.AdamW"),
        (
            singly(lambda _: built(torch.optim.AdamW))(model),
            "and the job's is Singly.*memory.optimizer=device",
        ),
        (built(torch.optim.AdamW, amsgrad=True), "optim.optimizer.amsgrad is True; .* it must be False"),
    ):
        with pytest.raises(ValueError, match=message):
            settings(optimizer)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"optimizer": "zero"}, "engine.optimizer is 'zero'; it can be ours or distributed"),
        ({"native": True}, "engine.native is true; it needs engine.optimizer=distributed, not ours"),
    ]
    for said, message in wrong:
        with pytest.raises(ValueError, match=message):
            Megatron(**said)


@SLOW
@pytest.mark.filterwarnings("ignore")
def test_a_native_checkpoint_that_cannot_be_written_is_an_error_that_a_run_survives(tmp_path: Path) -> None:
    from megatron.core import dist_checkpointing

    def full(*_: Any, **__: Any) -> None:
        raise CheckpointException("write", {0: (OSError("no space left"), StackSummary())})

    with (
        patch.object(megatron_native, "sharded", lambda *_: {}),
        patch.object(dist_checkpointing, "save", full),
        pytest.raises(OSError, match="(?s)iter_0000003.*no space left"),
    ):
        megatron_native.write(None, None, tmp_path, 3)


@SLOW
# megatron-core warns of packages that are not there
@pytest.mark.filterwarnings("ignore")
def test_the_settings_are_optims() -> None:
    from megatron.core.optimizer import OptimizerConfig

    model = torch.nn.Sequential(torch.nn.Embedding(3, 2), torch.nn.Linear(2, 2))
    optim = Optim(
        lambda groups, lr: torch.optim.AdamW(groups, lr=lr, betas=(0.8, 0.7), eps=1e-6),
        3e-4,
        weight_decay=0.2,
    )
    config, overrides = settings(optim.build(model))
    assert isinstance(config, OptimizerConfig)
    said = (config.lr, config.adam_beta1, config.adam_beta2, config.adam_eps, config.weight_decay)
    assert said == (3e-4, 0.8, 0.7, 1e-6, 0.2)
    decays = {
        name: [over["wd_mult"] for key, over in overrides.items() if key.matches(p, name)]
        for name, p in model.named_parameters()
    }
    assert decays == {"0.weight": [0.0], "1.weight": [1.0], "1.bias": [0.0]}
