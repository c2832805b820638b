"""The entry points: every mistake is one message and exit code 2, help and completion are right."""

import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hydra import compose, initialize_config_module
from omegaconf import DictConfig, OmegaConf

from longspan.train import cli
from longspan.train.__main__ import main as train_main
from longspan.train.config import Root, typed
from longspan.train.evaluate import Evaluation
from longspan.train.evaluate import main as evaluate_main
from longspan.train.sample import Sampling
from longspan.train.sample import main as sample_main

Said = tuple[int, str, str]  # exit code, stdout, stderr
Say = Callable[..., Said]


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
def say(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], folder: Path) -> Say:
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
    return run


@pytest.mark.parametrize(("word", "message"), REFUSED, ids=[word for word, _ in REFUSED])
def test_a_mistake_is_one_message(say: Say, word: str, message: str) -> None:
    code, out, err = say(train_main, "experiment=tiny", "track=none", word)
    assert err.startswith("longspan: error: ") and message in err
    assert code == 2
    assert err.count("\n") == 1 and len(err) < 500 and out == ""


def test_a_mistake_in_a_sweep_is_said_before_its_first_job(say: Say, folder: Path) -> None:
    code, _, err = say(train_main, "experiment=tiny", "optim.lr=1e-3,3e-3", "train.stepz=2", "--multirun")
    assert (code, err) == (2, "longspan: error: unknown key 'train.stepz'; did you mean 'train.steps'?\n")
    assert not list(folder.glob("runs/multirun-*"))


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


def test_help_fits_a_page_and_has_five_commands(say: Say) -> None:
    code, out, err = say(train_main, "--help")
    assert (code, err) == (0, "")
    assert "Longspan trains GPT models on sequences that are split over ranks." in out
    commands = [line for line in out.splitlines() if line.lstrip().startswith(("torchrun", "python"))]
    assert len(commands) == 5 and all("-m longspan.train" in line for line in commands)
    for group in ("experiment: ", "parallel: ", "mask: "):
        assert any(line.startswith(group) for line in out.splitlines()), group
    # Hydra has the choices of a group in a line, however many they are
    lines = [line for line in out.splitlines() if not line.startswith(("experiment: ", "mask: ", "model: "))]
    assert "\n\n\n" not in out and max(map(len, lines)) <= 120


def right(root: str, *overrides: str, schema: type = Root) -> DictConfig:
    with initialize_config_module("longspan.conf", version_base="1.3"):
        return typed(compose(root, overrides=list(overrides)), schema)


def test_cfg_job_prints_a_config_that_is_right(say: Say) -> None:
    code, out, err = say(train_main, "experiment=tiny", "train.steps=7", "--cfg", "job")
    assert (code, err) == (0, "")
    assert typed(DictConfig(OmegaConf.create(out))) == right("train", "experiment=tiny", "train.steps=7")
    for main, root, schema in ((sample_main, "sample", Sampling), (evaluate_main, "evaluate", Evaluation)):
        code, out, err = say(main, "run.dir=x", "--cfg", "job")
        assert (code, err) == (0, "")
        printed = typed(DictConfig(OmegaConf.create(out)), schema)
        assert printed == right(root, "run.dir=x", schema=schema)


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
        verbs = "train,evaluate,sample,draw,convert,encode,tokenize,submit,plan,report"
        assert f"usage: longspan {{{verbs}}} [overrides]" in out + err
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
