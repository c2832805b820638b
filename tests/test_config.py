"""Configuration and entry points: every choice composes, every mistake is one message and exit code 2."""

import copy
import datetime
import json
import os
import socket
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import cycle, islice, product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from longspan.train import cli
from longspan.train.__main__ import main as train_main
from longspan.train.config import OPTIMIZERS, ConfigError, made, redacted, redacted_argument, typed
from longspan.train.evaluate import Evaluation
from longspan.train.evaluate import main as evaluate_main
from longspan.train.job import Launch, check_numbers, processes, run_folder
from longspan.train.record import open_folder
from longspan.train.sample import Sampling
from longspan.train.sample import main as sample_main
from longspan.train.trained import config_of

CONF = Path(__file__).resolve().parents[1] / "conf"
Said = tuple[int, str, str]  # exit code, stdout, stderr
Say = Callable[..., Said]


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
        path = ["data.path=x"] if (group, choice) == ("data", "text") else []
        config("experiment=tiny", f"{group}={choice}", *path)


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


# (a word of the command line, what is said)
REFUSED = [
    ("train.stepz=3", "unknown key 'train.stepz'; did you mean 'train.steps'?"),
    ("+model.dmi=3", "unknown key 'model.dmi'; did you mean 'model.dim'?"),
    ("seed.x=1", "unknown key 'seed.x': 'seed' has no keys below it"),
    ("train.steps=abc", "train.steps: Value 'abc' of type 'str' could not be converted to Integer"),
    ("model.dim=x", "model.dim is 'x'; it must be a whole number"),
    ("data=text", "data.path has no value: give one with data.path=..."),
    ("model._target_=os.system", "model._target_ is 'os.system': a config may build longspan.*"),
    ("parallel=rong", "parallel=rong: there is no such choice; did you mean 'parallel=ring'?"),
    ("experiment=tyny", "experiment=tyny: there is no such choice; did you mean 'experiment=tiny'?"),
    ("steps", "cannot read 'steps': write key=value, and quotes around"),
    ("parallel.mesh.ring=2", "ring=2 x head=1 x tp=1 = 2 processes, but 1 were started: start a"),
    ("parallel.layout.axis=rong", "parallel.layout.axis is 'rong'; it can be dp, ring, head, tp"),
    ("run.dir=file/x", "run.dir=file/x cannot be written: Not a directory; give another run.dir or run.root"),
    ("model.vocab=100", "model.vocab is 100, but the data's tokenizer has 257 tokens: set model.vocab=null"),
    ("+mask@model.mask=causal", "model.mask is taken from mask: set that, and leave model.mask out"),
    ("resume=nowhere", "resume=nowhere: no such folder; give a checkpoint's, auto or never"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the commands run: one folder for all, since the data's cache is in it."""
    made = tmp_path_factory.mktemp("work")
    (made / "file").write_text("")
    return made


@pytest.fixture
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path) -> Iterator[Say]:
    """Runs an entry point with these words as its command line, in this process."""

    def run(main: Callable[[], None], *words: str) -> Said:
        monkeypatch.setattr(sys, "argv", ["longspan", *words])
        capfd.readouterr()
        code = 0
        try:
            main()
        except SystemExit as left:
            code = left.code if isinstance(left.code, int) else 0
        return code, *capfd.readouterr()

    def ended(code: int) -> None:
        raise SystemExit(-code)

    monkeypatch.chdir(folder)
    # the entry points set it, and end a process that has failed without ceremony
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.setattr(os, "_exit", ended)
    threads = torch.get_num_threads()
    yield run
    torch.set_num_threads(threads)


@pytest.mark.parametrize(("word", "message"), REFUSED, ids=[word for word, _ in REFUSED])
def test_a_mistake_is_one_message(say: Say, word: str, message: str) -> None:
    code, out, err = say(train_main, "experiment=tiny", "track=none", word)
    assert err.startswith("longspan: error: ") and message in err
    assert code == 2
    assert err.count("\n") == 1 and len(err) < 500 and out == ""


BAD_FILES = [
    ("empty", {}, "data.path='empty' is an empty corpus"),
    ("nowhere", None, "data.path='nowhere' does not exist: give a file or a folder of texts"),
    ("blank", {"a.txt": b""}, "a.txt: empty document"),
    ("short", {"a.txt": b"x"}, "leaves no document to hold out: the corpus has 1 document, at least 2 are"),
    ("latin", {"a.txt": b"caf\xe9", "b.txt": b"\xff"}, "a.txt: not UTF-8 at byte 3"),
]


@pytest.mark.parametrize(("name", "files", "message"), BAD_FILES, ids=[name for name, _, _ in BAD_FILES])
def test_bad_data_is_one_message(
    say: Say, folder: Path, name: str, files: dict[str, bytes] | None, message: str
) -> None:
    if files is not None:
        (folder / name).mkdir()
        for file, content in files.items():
            (folder / name / file).write_bytes(content)
    code, _, err = say(train_main, "experiment=tiny", "track=none", "data=text", f"data.path={name}")
    assert code == 2 and err.startswith("longspan: error: data.") and message in err
    assert err.count("\n") < 15


def test_the_other_entry_points_say_it_alike(say: Say, folder: Path) -> None:
    said = [
        (sample_main, ["promt=x"], "unknown key 'promt'; did you mean 'prompt'?"),
        (sample_main, [], "run.dir has no value: give one with run.dir=..."),
        (sample_main, ["run.dir=none"], "run.dir=none holds no config.yaml; give the folder of a run"),
        (evaluate_main, ["run.dir=none"], "run.dir=none holds no config.yaml; give the folder of a run"),
        (evaluate_main, ["run.dir=none", "samples=0"], "samples is 0; it must be at least 1"),
        (evaluate_main, ["run.dir=none", "depths=[2]"], "depths is [2.0]; it must list numbers from 0"),
        (evaluate_main, ["run.dir=none", "needles=x"], "needles: Value 'x' of type 'str' could not be"),
    ]
    for main, words, message in said:
        code, out, err = say(main, *words)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert err.startswith(f"longspan: error: {message}")


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
    open_folder(run, plain, {})
    assert not any("hush" in path.read_text() for path in run.iterdir())
    assert json.loads((run / "run.json").read_text())["command"][-1] == "seed=1"
    assert redacted_argument("data.tokenizer=a=b") == "data.tokenizer=a=b"


def test_help_fits_a_page_and_has_five_commands(say: Say) -> None:
    code, out, err = say(train_main, "--help")
    assert (code, err) == (0, "")
    assert "Longspan trains GPT models on sequences that are split over ranks." in out
    commands = [line for line in out.splitlines() if line.lstrip().startswith(("torchrun", "python"))]
    assert len(commands) == 5 and all("-m longspan.train" in line for line in commands)
    for group in ("experiment: ", "parallel: ", "mask: "):
        assert any(line.startswith(group) for line in out.splitlines()), group
    assert "\n\n\n" not in out and max(map(len, out.splitlines())) <= 120


def test_cfg_job_prints_a_config_that_is_right(say: Say) -> None:
    code, out, err = say(train_main, "experiment=tiny", "train.steps=7", "--cfg", "job")
    assert (code, err) == (0, "")
    assert typed(DictConfig(OmegaConf.create(out))) == config("experiment=tiny", "train.steps=7")
    for main, root, schema in ((sample_main, "sample", Sampling), (evaluate_main, "evaluate", Evaluation)):
        code, out, err = say(main, "run.dir=x", "--cfg", "job")
        assert (code, err) == (0, "")
        assert typed(DictConfig(OmegaConf.create(out)), schema) == config(
            "run.dir=x", root=root, schema=schema
        )


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("longspan train experiment=ti", "experiment=tiny"),
        ("longspan train train.st", "train.steps="),
        ("longspan sample temp", "temperature="),
        ("longspan evaluate nee", "needles="),
    ],
)
def test_tab_completion_knows_the_verb(
    say: Say, monkeypatch: pytest.MonkeyPatch, line: str, wanted: str
) -> None:
    monkeypatch.setenv("COMP_LINE", line)
    monkeypatch.setenv("COMP_POINT", str(len(line)))
    code, out, err = say(cli.main, "-sc", "query=bash")
    assert (code, err) == (0, "")
    assert wanted in out.split()


def test_the_console_script_names_its_verbs(say: Say) -> None:
    for words, code in (([], 2), (["trian"], 2), (["--help"], 0)):
        found, out, err = say(cli.main, *words)
        assert found == code
        assert "usage: longspan {train,evaluate,sample} [overrides]" in out + err
    code, _, err = say(cli.main, "train", "train.stepz=1")
    assert code == 2 and "did you mean 'train.steps'?" in err


def test_a_rank_waits_before_it_repeats_what_rank_0_says(
    say: Say, monkeypatch: pytest.MonkeyPatch, folder: Path
) -> None:
    slept: list[float] = []
    monkeypatch.setattr("longspan.train.entry.time.sleep", slept.append)
    report = folder / "error.json"
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("TORCHELASTIC_ERROR_FILE", str(report))):
        monkeypatch.setenv(name, value)
    code, _, err = say(train_main, "model.dim=x")
    assert (code, err) == (2, "longspan: rank 1: error: model.dim is 'x'; it must be a whole number\n")
    assert slept and min(slept) >= 1
    # what torchrun's own report then ends with
    assert json.loads(report.read_text())["message"]["message"] == err.split("rank 1: ")[1].strip()


def test_a_port_in_use_is_one_message(say: Say, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        rank = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
        for name, value in (rank | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}).items():
            monkeypatch.setenv(name, value)
        code, _, err = say(train_main, "experiment=tiny", "track=none")
    assert code == 2 and err.splitlines()[-1].startswith(
        f"longspan: error: rank 0 of 2 cannot join the others at MASTER_ADDR=127.0.0.1 MASTER_PORT={port}: "
    )
    assert "address already in use; torchrun --standalone finds a free port" in err
