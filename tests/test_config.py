"""The configuration: every choice composes, what cannot be is refused, secrets stay out of files."""

import copy
import datetime
import json
import os
import sys
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from longspan.train.config import OPTIMIZERS, ConfigError, made, redacted, redacted_argument, typed
from longspan.train.job import Launch, check_numbers, processes, run_folder
from longspan.train.record import open_folder
from longspan.train.trained import config_of

CONF = Path(__file__).resolve().parents[1] / "conf"


def choices(group: str) -> list[str]:
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def config(*overrides: str, root: str = "train", schema: type | None = None) -> DictConfig:
    with initialize_config_module("longspan.conf", version_base="1.3"):
        cfg = compose(root, overrides=list(overrides))
    return typed(cfg, schema) if schema else typed(cfg)


def some() -> list[tuple[str, str, str]]:
    """Every experiment, parallel and mask at least once."""
    experiments, layouts, masks = (choices(group) for group in ("experiment", "parallel", "mask"))
    count = max(len(experiments), len(layouts), len(masks))
    both = zip(cycle(experiments), cycle(layouts), cycle(masks), strict=True)
    return list(islice(both, count))


@pytest.mark.parametrize(("experiment", "parallel", "mask"), some())
def test_every_choice_composes(experiment: str, parallel: str, mask: str) -> None:
    cfg = config(f"experiment={experiment}", f"parallel={parallel}", f"mask={mask}")
    assert cfg.experiment_name == experiment
    assert cfg.parallel.mesh._target_ == "longspan.parallel.mesh.Mesh"
    assert made(cfg.mask).classify


@pytest.mark.slow
@pytest.mark.parametrize("experiment", choices("experiment"))
def test_all_choices_compose_together(experiment: str) -> None:
    for parallel, mask in product(choices("parallel"), choices("mask")):
        config(f"experiment={experiment}", f"parallel={parallel}", f"mask={mask}")


@pytest.mark.parametrize("group", ["model", "data", "engine", "objective", "optim", "memory", "track"])
def test_the_other_groups_compose(group: str) -> None:
    for choice in choices(group):
        needed = ("text", "images", "latents", "indexed", "streaming")
        path = ["data.path=x"] if group == "data" and choice in needed else []
        path += ["data.tokenizer=bytes"] if choice == "indexed" else []
        # tiny sets what only a GPT and its texts have
        texts = group != "data" or choice in ("needle", "stdlib", "text")
        base = ["experiment=tiny"] if group != "model" and texts else []
        config(*base, f"{group}={choice}", *path)


def test_every_experiment_shows_its_command_first() -> None:
    for name in choices("experiment"):
        comments = [
            x for x in (CONF / "experiment" / f"{name}.yaml").read_text().splitlines() if x[:1] == "#"
        ]
        assert comments[0] == "# @package _global_"
        assert "-m longspan.train" in comments[1] and f"experiment={name}" in comments[1]


def test_values_are_what_the_command_says_and_cannot_be_changed_later() -> None:
    cfg = config("experiment=tiny", "train.steps=7", "optim.lr=1", "model.rope.scaling=linear", "seed=3")
    assert (cfg.train.steps, cfg.optim.lr, cfg.model.rope.scaling) == (7, 1, "linear")
    # data.seed: ${seed}
    assert cfg.data.seed == 3
    with pytest.raises(Exception, match="read-only"):
        cfg.train.steps = 8


# (key, value, what is said) of a config that composes, and is wrong
WRONG = [
    ("model.rope.thta", 3, "unknown key 'model.rope.thta'; did you mean 'model.rope.theta'?"),
    ("optim.optimizer.beta", 3, "unknown key 'optim.optimizer.beta'; did you mean 'optim.optimizer.betas'?"),
    ("train.stepz", 3, "unknown key 'train.stepz'; did you mean 'train.steps'?"),
    ("qqq", 1, "unknown key 'qqq'; known here: checkpoint, data, device,"),
    ("model._args_", [1], "unknown key 'model._args_'"),
    ("train", 3, "train is 3; it holds steps, micro_batch, "),
    ("train.steps", "???", "train.steps has no value: give one with train.steps=..."),
    ("model", None, "model is None, which builds nothing: it needs a _target_, as in conf/"),
    ("parallel.layout", None, "parallel.layout is None, which builds nothing: it needs a _target_"),
    ("seed", "${nope}", "seed: Interpolation key 'nope' not found"),
    ("train.steps", "abc", "train.steps: Value 'abc' of type 'str' could not be converted to Integer"),
    ("model.dim", 1.5, "model.dim is 1.5; it must be a whole number"),
    ("model.tied", 2, "model.tied is 2; it must be true or false"),
    ("model.kv_heads", [1], "model.kv_heads is [1]; it must be a whole number or null"),
    ("optim.lr", True, "optim.lr is True; it must be a number"),
    ("optim.schedule", "linear", "optim.schedule is 'linear'; it must be 'cosine' or 'wsd' or 'constant'"),
    ("parallel.mesh.dp", "some", "parallel.mesh.dp is 'some'; it must be a whole number or 'auto'"),
    ("model._target_", "pathlib.Path.unlink", "model._target_ is 'pathlib.Path.unlink': a config may build"),
    ("model._target_", "torch.load", "a config may build longspan.* or torch.optim.AdamW, "),
    ("model._target_", ["longspan.models.gpt.GPT"], "a config may build longspan.*"),
    ("model._target_", "longspan.models.gpt.GPX", "module 'longspan.models.gpt' has no attribute 'GPX'"),
    ("model._target_", "longspan.nowhere.GPT", "cannot be imported: No module named 'longspan.nowhere'"),
    ("model.rope._target_", "os.system", "model.rope._target_ is 'os.system': a config may"),
    ("optim.optimizer._target_", "os.system", "optim.optimizer._target_ is 'os.system': a config may"),
    ("data.path", [{"_target_": "os.system"}], "unknown key 'data.path'"),
    # what our modules have imported, and our functions, are not to be had
    ("model._target_", "longspan.train.sweep.subprocess.run", "cannot be imported: No module named"),
    ("model._target_", "longspan.train.entry.Path", "which is no class of longspan.train.entry"),
    ("model._target_", "longspan.train.record.write_json", "which is no class of longspan.train.record"),
]


@pytest.fixture(scope="module")
def composed() -> DictConfig:
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return compose("train", overrides=["experiment=tiny"])


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_config_that_cannot_be_is_refused(
    composed: DictConfig, key: str, value: object, message: str
) -> None:
    wrong = copy.deepcopy(composed)
    OmegaConf.set_struct(wrong, False)
    OmegaConf.update(wrong, key, value, merge=False, force_add=True)
    with pytest.raises(ConfigError) as caught:
        typed(wrong)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@dataclass
class Listed:
    items: Any = None


def test_a_target_in_a_list_is_checked_too() -> None:
    items = [{"_target_": "longspan.models.rope.Rope"}, {"_target_": "os.system"}]
    with pytest.raises(ConfigError, match=r"\[1\]._target_ is 'os.system': a config may build"):
        typed(OmegaConf.create({"items": items}), Listed)


NUMBERS = [
    ("train.steps", 0, "train.steps is 0; it must be at least 1"),
    ("train.clip", -1.0, "train.clip is -1.0; it must be at least 0"),
    ("train.clip", float("nan"), "train.clip is nan; it must be at least 0"),
    ("train.seconds", 0.0, "train.seconds is 0.0; it must be null or more than 0"),
    ("checkpoint.keep", 0, "checkpoint.keep is 0; it must be at least 1"),
    ("checkpoint.permanent", -1, "checkpoint.permanent is -1; it must be at least 0"),
    ("train.precision", "fp16", "train.precision is 'fp16'; it can be float32 or bfloat16"),
]


@pytest.mark.parametrize(("key", "value", "message"), NUMBERS)
def test_numbers_that_no_job_runs_with_are_refused(
    composed: DictConfig, key: str, value: object, message: str
) -> None:
    wrong = copy.deepcopy(composed)
    OmegaConf.update(wrong, key, value)
    with pytest.raises(ValueError) as caught:
        check_numbers(typed(wrong))
    assert str(caught.value) == message


def test_a_launch_that_cannot_be_is_refused() -> None:
    for wanted, seconds, message in (
        ("tpu", 9.0, r"device is 'tpu'; it can be auto, cpu"),
        ("cpu", 0.0, r"timeout_s is 0.0; it must be more than 0 seconds"),
    ):
        with pytest.raises(ValueError, match=message), processes(Launch(), wanted, seconds):
            pass


def test_ranks_share_the_cores_and_give_them_back() -> None:
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    for local_world, threads in ((1, cores), (cores, 1), (4 * cores, 1)):
        with processes(Launch(local_world=local_world), "cpu", 9.0) as device:
            assert (device.type, torch.get_num_threads(), dist.get_world_size()) == ("cpu", threads, 1)
        assert torch.get_num_threads() == before and not dist.is_initialized()


@pytest.mark.parametrize("name", ["a/b", "..", "/x"])
def test_a_run_is_named_by_one_plain_word(composed: DictConfig, name: str) -> None:
    cfg = copy.deepcopy(composed)
    cfg.run.name = name
    with pytest.raises(ValueError, match=rf"run.name is '{name}'; it must be one plain folder name"):
        run_folder(cfg, datetime.datetime(2026, 1, 2, 3, 4, 5))
    cfg.run.name = "mine"
    assert run_folder(cfg, datetime.datetime(2026, 1, 2, 3, 4, 5)) == Path("runs/mine")
    cfg.run.name = None
    assert run_folder(cfg, datetime.datetime(2026, 1, 2, 3, 4, 5)) == Path("runs/tiny-20260102-030405")
    cfg.run.dir = "x/y"
    assert run_folder(cfg, datetime.datetime(2026, 1, 2, 3, 4, 5)) == Path("x/y")


def test_what_a_constructor_says_comes_without_hydras_frame() -> None:
    for group, key, value, message in (
        ("engine", "bucket_mb", -1.0, "engine.bucket_mb is -1.0; it must be at least 0"),
        ("parallel.mesh", "ring", 0, "parallel.mesh.ring is 0; it must be auto or a whole number from 1"),
        ("model", "rope.theta", 0.5, "rope.theta is 0.5 and rope.factor 1.0; they need theta > 1, factor"),
    ):
        node = OmegaConf.select(config("experiment=tiny", f"{group}.{key}={value}"), group)
        with pytest.raises(ValueError) as caught:
            made(node)
        assert str(caught.value).startswith(message) and type(caught.value) is ValueError


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("model: [", "is no config: while parsing"),
        ("model: !!python/object/apply:os.system [touch pwned]", "is no config: could not determine"),
        ("- a", "is no config: it holds a ListConfig"),
        ("", "data has no value: give one with data="),
    ],
)
def test_a_run_folder_from_elsewhere_runs_no_code(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        config_of(tmp_path)
    assert message in str(caught.value)


def test_a_run_folders_config_is_checked_like_a_command(tmp_path: Path) -> None:
    kept = OmegaConf.to_container(config("experiment=tiny"), resolve=True)
    assert isinstance(kept, dict)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept))
    assert config_of(tmp_path) == config("experiment=tiny")
    for engine in ("deepspeed", "megatron"):
        # whose checkpoints are read without it
        OmegaConf.save(config("experiment=tiny", f"engine={engine}"), tmp_path / "config.yaml")
        assert config_of(tmp_path).engine._target_.endswith("FSDP")
    kept["mask"] = {"_target_": "os.system", "command": "touch pwned"}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(kept))
    with pytest.raises(ConfigError, match=r"mask._target_ is 'os.system': a config may build longspan"):
        config_of(tmp_path)


def test_the_optimizers_that_may_be_built_exist(composed: DictConfig) -> None:
    for target in OPTIMIZERS:
        # Muon is newer than the oldest torch that is supported
        if target != "torch.optim.Muon" or hasattr(torch.optim, "Muon"):
            cfg = copy.deepcopy(composed)
            cfg.optim.optimizer = {"_target_": target, "_partial_": True}
            assert made(typed(cfg).optim.optimizer).func.__module__.startswith("torch.optim")


def test_secrets_are_not_written_down(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_SECRET", "hush")
    cfg = OmegaConf.create(
        {
            "track": {"api_key": "${oc.env:A_SECRET}", "project": "open", "tags": ["open"]},
            "password": ["hush", "hush"],
            "access_token": {"inner": "hush"},
            "tokens": 200,
            "secret": None,
            "tokenizer": "bytes",
            "monkey": "seen",
        }
    )
    plain = redacted(cfg)
    hidden = "<redacted>"
    assert plain == {
        "track": {"api_key": hidden, "project": "open", "tags": ["open"]},
        "password": hidden,
        "access_token": hidden,
        "tokens": 200,
        "secret": None,
        "tokenizer": "bytes",
        "monkey": "seen",
    }
    monkeypatch.setattr(sys, "argv", ["longspan", "track.api_key=hush", "+password=hush", "seed=1"])
    run = tmp_path / "run"
    run.mkdir()
    open_folder(run, tmp_path, plain, {})
    assert (tmp_path / "latest").resolve() == run
    # a run that is opened through the link leaves it as it is
    open_folder(tmp_path / "latest", tmp_path, plain, {})
    assert (tmp_path / "latest").resolve() == run
    assert not any("hush" in path.read_text() for path in run.iterdir())
    assert json.loads((run / "run.json").read_text())["command"][-1] == "seed=1"
    assert redacted_argument("data.tokenizer=a=b") == "data.tokenizer=a=b"
