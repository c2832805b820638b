"""DeepSpeed: each ZeRO stage trains as one process does, and goes on where other engines stopped."""

import json
import math
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from omegaconf import DictConfig
from torch import Tensor

from jobs import (
    Once,
    Ran,
    assert_same,
    config,
    first_batch,
    furthest,
    gone_on,
    joined,
    launch_of,
    refusal,
    ring,
    run,
    values,
    whole,
    zero,
)
from longspan.kernels.attention import attention
from longspan.kernels.mask import Mask
from longspan.kernels.span import Span
from longspan.parallel.placement import Placement
from longspan.parallel.ulysses import Ulysses
from longspan.train.checkpoint import Checkpoints
from longspan.train.config import made
from longspan.train.engine.deepspeed import DeepSpeed
from longspan.train.engine.zero_pieces import blank_state
from longspan.train.job import build
from longspan.train.loop import resume
from longspan.train.meter import parameter_counts
from test_oracles import needs
from world import Worlds

pytestmark = [
    needs("deepspeed", "deepspeed"),
    # DeepSpeed calls what torch has new names for
    pytest.mark.filterwarnings("ignore:.*:FutureWarning:torch", "ignore:.*:DeprecationWarning:torch"),
]
TEN = "train.steps=10"
ONE = ("parallel=single", "data.pack=true", TEN)
SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    ("size", "stage", "overrides"),
    [
        pytest.param(2, 1, ring("zigzag"), marks=SLOW),
        (2, 2, ring("zigzag")),
        (2, 3, ("parallel=ulysses",)),
        pytest.param(2, 0, ring("zigzag"), marks=SLOW),
        pytest.param(2, 1, ("engine.offload=true", *ring()), marks=SLOW),
        pytest.param(2, 3, ("engine.offload=true", "engine.offload_weights=true", *ring()), marks=SLOW),
        pytest.param(4, 3, ring("zigzag", "parallel.mesh.dp=2", "train.micro_batch=1"), marks=SLOW),
        *(
            pytest.param(2, stage, (*ring(), "train.micro_batch=1", "train.accumulate=2"), marks=SLOW)
            for stage in range(4)
        ),
    ],
)
def test_a_stage_trains_as_one_process(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, size: int, stage: int,
    overrides: tuple[str, ...],
) -> None:  # fmt: skip
    cfg = config(data_cache, TEN, *zero(stage, tmp_path, *overrides))
    assert_same(world(size)(run, cfg, tmp_path / "checkpoints"), once(1, *ONE))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ddp", 3),
        (2, "fsdp"),
        pytest.param(1, 0, marks=SLOW),
        pytest.param(0, 2, marks=SLOW),
    ],
)
def test_a_checkpoint_goes_on_under_another_engine(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, before: int | str, after: int | str
) -> None:
    both = ((f"engine={x}",) if isinstance(x, str) else zero(x, tmp_path) for x in (before, after))
    started, then = ((2, config(data_cache, TEN, *engine, *ring())) for engine in both)
    assert_same(gone_on(world, tmp_path / "checkpoints", started, then), once(1, *ONE), since=5)


@SLOW
@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, "ddp"), ("ddp", 1), (1, 2)])
def test_frozen_weights_stay_and_move_between_engines(
    world: Worlds, data_cache: str, tmp_path: Path, before: int | str, after: int | str
) -> None:
    """In stage 3 with weights apart and, averaged, with its pieces."""
    words = (data_cache, TEN, "lora.rank=2", "data.pack=true", "train.ema=0.9")
    one = world(1)(run, config(*words, "parallel=single"), tmp_path / "one")
    both = ((f"engine={x}",) if isinstance(x, str) else zero(x, tmp_path) for x in (before, after))
    started, then = ((2, config(*words, *engine, *ring("zigzag"))) for engine in both)
    assert_same(gone_on(world, tmp_path / "checkpoints", started, then), one, since=5)


def poisoned(rank: int, cfg: DictConfig) -> tuple[float, float, float, list[str], tuple[int, int]]:
    """The norms of a step, of one whose loss is not finite and of the one after; the names of what the second
    changed; how many parameters are counted.
    """
    with joined(rank) as device:
        job = build(cfg, launch_of(rank), device)
        part, attend = first_batch(job, device)

        def step(valid: float) -> float:
            job.engine.backward(part, attend, valid, last=True)
            return job.engine.step(1e-3, 1.0)

        good = step(100.0)
        before = flat(job.engine.save())
        bad = step(math.nan)
        after = flat(job.engine.save())
        changed = [name for name in before if not before[name].equal(after[name])]
        return good, bad, step(100.0), changed, parameter_counts(job.model)


def flat(state: dict[str, object], path: str = "") -> dict[str, Tensor]:
    """Copies of all tensors, by their path; of a DTensor, this rank's part."""
    found: dict[str, Tensor] = {}
    for name, x in state.items():
        if isinstance(x, dict):
            found |= flat(x, f"{path}{name}/")
        else:
            assert isinstance(x, Tensor)
            found[f"{path}{name}"] = getattr(x, "_local_tensor", x).detach().clone()
    return found


@pytest.mark.parametrize("stage", [pytest.param(0, marks=SLOW), pytest.param(2, marks=SLOW), 3])
def test_a_norm_that_is_not_finite_changes_nothing(
    world: Worlds, data_cache: str, tmp_path: Path, stage: int
) -> None:
    cfg = config(data_cache, *zero(stage, tmp_path, *ring()))
    counted = parameter_counts(made(cfg.model)(vocab=257, mask=made(cfg.mask)))
    for good, bad, after, changed, counts in world(2)(poisoned, cfg):
        assert math.isfinite(good) and math.isfinite(after) and not math.isfinite(bad)
        assert not changed
        assert counts == counted


ADAMW = {"type": "AdamW", "params": {"betas": [0.9, 0.95], "eps": 1e-8, "torch_adam": True}}


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_its_own_optimizer_is_ours(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, stage: int
) -> None:
    cfg = config(data_cache, TEN, *zero(stage, tmp_path, *ring(), optimizer=ADAMW))
    assert_same(world(2)(run, cfg, tmp_path / "checkpoints"), once(1, *ONE))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 3])
def test_bfloat16_is_what_ddp_makes_of_it(
    world: Worlds, once: Once, data_cache: str, tmp_path: Path, stage: int
) -> None:
    low = (TEN, "train.precision=bfloat16", *ring())
    ran = world(2)(run, config(data_cache, *zero(stage, tmp_path, *low)), tmp_path / "checkpoints")
    want, exact = once(2, *low)[0], once(1, *ONE)[0]
    apart = furthest(values(want.rows, "loss"), values(exact.rows, "loss"))
    assert furthest(values(ran[0].rows, "loss"), values(want.rows, "loss")) < 0.2 * apart


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_average_is_kept(world: Worlds, once: Once, data_cache: str, tmp_path: Path, stage: int) -> None:
    same = (TEN, "train.ema=0.9", "eval.every=5")
    cfg = config(data_cache, *same, *zero(stage, tmp_path, *ring()))
    ran = world(2)(run, cfg, tmp_path / "checkpoints")
    assert_same(ran, once(1, "parallel=single", "data.pack=true", *same))


def universal(rank: int, cfg: DictConfig, folder: Path, tag: str) -> list[str]:
    """The names of what differs between our checkpoint and DeepSpeed's universal one, loaded by DeepSpeed."""
    with joined(rank) as device:
        jobs = [build(cfg, launch_of(rank), device) for _ in range(2)]
        resume(jobs[0], Checkpoints(folder / "checkpoints", asynchronous=False), "auto")
        engine = jobs[1].engine
        assert isinstance(engine, DeepSpeed)
        loaded, _ = engine.engine.load_checkpoint(str(folder / "native"), tag=tag)
        assert loaded is not None
        ours, read = (flat(job.engine.save()) for job in jobs)
        # its step is one number for all parameters, kept elsewhere
        return [n for n in ours if not n.endswith("/step") and not ours[n].equal(read[n])]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_its_own_checkpoint_becomes_universal(
    world: Worlds, data_cache: str, tmp_path: Path, stage: int
) -> None:
    short = ("train.steps=3", "checkpoint.every=0", "eval.final=0", "engine.native=true")
    own = zero(stage, tmp_path, *ring(), *short, f"run.dir={tmp_path}/run")
    assert world(2)(whole, config(data_cache, *own)) == [0, 0]
    folder = tmp_path / "run" / "native"
    words = ("--input_folder", folder / "step-00000003", "--output_folder", folder / "universal")
    command = [sys.executable, "-m", "deepspeed.checkpoint.ds_to_universal", *map(str, words)]
    subprocess.run(command, check=True, capture_output=True, timeout=100)
    own = zero(stage, tmp_path, "parallel=single", *short, checkpoint={"load_universal": True})
    assert world(1)(universal, config(data_cache, *own), tmp_path / "run", "universal") == [[]]


def theirs(rank: int, cfg: DictConfig, folder: Path) -> Ran:
    """The job with DeepSpeed's DistributedAttention in the place of our Ulysses."""
    from deepspeed.sequence.layer import DistributedAttention

    def attend(
        layout: Ulysses, q: Tensor, k: Tensor, v: Tensor, mask: Mask, placement: Placement,
        **_: object,
    ) -> tuple[Tensor, None]:  # fmt: skip
        everywhere = (Span(0, placement.length),)

        def whole(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return attention(q, k, v, mask, everywhere, everywhere)[0]

        return DistributedAttention(whole, dist.group.WORLD, scatter_idx=2, gather_idx=1)(q, k, v, 0), None

    with patch.object(Ulysses, "attention", attend):
        return run(rank, cfg, folder)


@pytest.mark.slow
def test_ulysses_trains_as_deepspeeds_own(world: Worlds, data_cache: str, tmp_path: Path) -> None:
    cfg = config(data_cache, TEN, *zero(2, tmp_path, "parallel=ulysses"))
    own = world(2)(theirs, cfg, tmp_path / "theirs")
    assert_same(world(2)(run, cfg, tmp_path / "ours"), own)


FACTORED = (
    "optim.optimizer._target_=torch.optim.Adafactor",
    "~optim.optimizer.betas",
    "~optim.optimizer.eps",
)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("parallel.mesh.tp=2", "parallel=single"), "parallel.mesh.tp is 2; engine=deepspeed splits no"),
        (FACTORED, "engine.stage=2 updates flat pieces of them: take engine.stage=0, or one of AdamW, Adam"),
    ],
)
def test_what_it_cannot_train_is_refused(
    world: Worlds, data_cache: str, overrides: tuple[str, ...], message: str
) -> None:
    found = world(2)(refusal, config(data_cache, "engine=deepspeed", *overrides))
    assert all(message in text for (text,) in found), found


@pytest.mark.parametrize(
    ("said", "settings", "message"),
    [
        ({}, {"stage": 4}, "engine.stage is 4; it can be 0, 1, 2 or 3"),
        ({}, {"stage": 0, "offload": True}, "engine.offload is true; it needs engine.stage=1, 2 or 3, not 0"),
        ({}, {"offload_weights": True}, "engine.offload_weights is true; it needs engine.stage=3, not 2"),
        ({"zero_optimization": {"stage": 1}}, {"stage": 3}, "stage is 3, but engine.config says 1"),
        ({"zero_optimization": {"offload_param": {"device": "cpu"}}}, {}, "offload_weights is true; it"),
        ({"zero_optimization": {"offload_optimizer": {"device": "nvme"}}}, {}, "device is .nvme.; it can"),
        ({"gradient_clipping": 1.0}, {}, "says gradient_clipping is 1.0: train.clip gives it"),
        ({"train_batch_size": 8}, {}, "train_batch_size is 8: train.micro_batch, train.accumulate and"),
        ({"bf16": {"enabled": True}}, {}, "bf16.enabled is True: take train.precision=bfloat16; leave bf16"),
        ({"optimizer": {"type": "Adam", "params": {"lr": 1e-3}}}, {}, "optimizer.params.lr is 0.001: optim"),
        ({"zero_optimization": {"zero_quantized_weights": True}}, {}, "weights would be rounded to 8 bits"),
        ([1], {}, "holds a list; it must be a JSON object"),
    ],
)  # fmt: skip
def test_what_contradicts_is_refused(
    tmp_path: Path, said: object, settings: dict[str, object], message: str
) -> None:
    (tmp_path / "own.json").write_text(json.dumps(said))
    with pytest.raises(ValueError, match=message):
        DeepSpeed(config=str(tmp_path / "own.json"), **settings)  # type: ignore[arg-type]


def test_a_state_is_known_before_the_first_step() -> None:
    weight = torch.nn.Parameter(torch.ones(3, 2))
    weight.grad = torch.ones(3, 2)
    for optimizer in (torch.optim.AdamW([weight]), torch.optim.SGD([weight], momentum=0.9)):
        blank = blank_state(optimizer)
        assert not optimizer.state and all(not x.any() for x in blank.values())
        optimizer.step()
        assert blank.keys() == optimizer.state[weight].keys()
        assert all(bool(x.ndim) == bool(optimizer.state[weight][key].ndim) for key, x in blank.items())


def test_what_a_json_leaves_open_is_ours(tmp_path: Path) -> None:
    path = tmp_path / "own.json"
    path.write_text('{"train_batch_size": "auto", "zero_optimization": {"stage": 3, "overlap_comm": "auto"}}')
    assert DeepSpeed(config=str(path)).zero == {"stage": 3}
    assert DeepSpeed().zero == {"stage": 2}
