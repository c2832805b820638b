import contextlib
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from longspan.train.checkpoint import Checkpoints, SaveError
from longspan.train.manifest import DamagedCheckpoint
from states import State, bits, blank, leaves, loaded, make, save, small_files, tree


@pytest.mark.parametrize("asynchronous", [False, True])
def test_round_trip_is_bit_equal_and_leaves_only_the_checkpoint(tmp_path: Path, asynchronous: bool) -> None:
    extra = {"step": 120, "deep": [{"x": 0.1, "ok": True, "none": None}], "text": "é\n", "best": float("inf")}
    checkpoints = Checkpoints(tmp_path / "a" / "b", asynchronous=asynchronous)
    checkpoints.save(120, make(1), extra)
    checkpoints.wait()
    assert loaded(tmp_path / "a" / "b", make(1)) == (bits(make(1)), extra)
    assert sorted(os.listdir(tmp_path / "a" / "b")) == ["latest", "step-00000120"]
    assert (tmp_path / "a" / "b" / "latest").read_text() == "step-00000120\n"
    names = {".metadata", "__0_0.distcp", "extra.json", "manifest.json"}
    assert set(os.listdir(tmp_path / "a" / "b" / "step-00000120")) == names


def test_asynchronous_saves_hold_the_state_at_the_call_and_equal_synchronous_ones(tmp_path: Path) -> None:
    for name, asynchronous in (("sync", False), ("async", True)):
        checkpoints = Checkpoints(tmp_path / name, asynchronous=asynchronous)
        state = make(1)
        for step in range(3):
            checkpoints.save(step, state, {"step": step})
            for tensor in leaves(state):
                tensor.copy_(tensor + 1)
        checkpoints.wait()
    assert tree(tmp_path / "async") == tree(tmp_path / "sync")
    assert len(tree(tmp_path / "sync")) == 3 * 4 + 1


@pytest.mark.parametrize(
    ("extra", "told"),
    [
        ({"a": {"b": [1, (2,)]}}, r"extra\['a'\]\['b'\]\[1\] is of type tuple"),
        ({"loss": torch.tensor(1.0)}, r"extra\['loss'\] is of type Tensor"),
        ({"loss": np.float64(1)}, r"extra\['loss'\] is of type float64"),
        ({"by_rank": {0: 1}}, r"extra\['by_rank'\] has the key 0"),
        ([1], "extra is of type list"),
    ],
)
def test_extra_that_json_would_change_is_refused_by_its_key(tmp_path: Path, extra: Any, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Checkpoints(tmp_path / "c").save(1, make(1), extra)
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize(
    ("state", "told"),
    [
        ({"optim": {"lr": 0.1}}, r"state\['optim'\]\['lr'\] is of type float"),
        ({"optim": {"groups": [torch.ones(1)]}}, r"state\['optim'\]\['groups'\] is of type list"),
        ({"model": {("a", "b"): torch.ones(1)}}, r"state\['model'\] has the key \('a', 'b'\)"),
        ({"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}, "duplicated"),
    ],
)
def test_state_that_is_no_tensor_is_refused_by_its_key(tmp_path: Path, state: State, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Checkpoints(tmp_path).save(1, state, {})


def test_other_bad_arguments_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="checkpoint.keep=0"):
        Checkpoints(tmp_path, keep=0)
    with pytest.raises(ValueError, match="step -1"):
        Checkpoints(tmp_path).save(-1, make(1), {})


def test_what_to_load_is_auto_never_or_a_path(tmp_path: Path) -> None:
    folder = tmp_path / "c"
    checkpoints = Checkpoints(folder)
    assert checkpoints.load("auto", make(1)) is None
    checkpoints.save(1, make(1), {"step": 1})
    # Loading finishes the save that is pending.
    assert checkpoints.load("auto", blank(make(1))) == {"step": 1}
    checkpoints.save(2, make(2), {"step": 2})
    checkpoints.wait()
    assert loaded(folder, make(2)) == (bits(make(2)), {"step": 2})
    assert loaded(folder, make(1), str(folder / "step-00000001")) == (bits(make(1)), {"step": 1})
    assert loaded(folder, make(1), "never") == (bits(blank(make(1))), None)
    with pytest.raises(FileNotFoundError, match="no such folder"):
        checkpoints.load(str(folder / "step-00000003"), make(1))
    with pytest.raises(ValueError, match="give one, such as .*step-00000002"):
        checkpoints.load(str(folder), make(1))
    with pytest.raises(DamagedCheckpoint, match="manifest.json is missing"):
        checkpoints.load(str(tmp_path), make(1))


def test_a_state_that_does_not_fit_is_refused_before_anything_is_read(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(
        1, {"model": {"a": torch.ones(2), "b": torch.ones(3)}, "optim": {"a": torch.ones(2)}}, {}
    )
    kept = torch.zeros(2)
    for model, told in (
        (
            {"a": kept, "c": torch.ones(3)},
            "model.b is only in the checkpoint; model.c is not in the checkpoint",
        ),
        (
            {"a": kept, "b": torch.ones(4)},
            r"model.b is torch.float32 \[3\] in the checkpoint and torch.float32 \[4\]",
        ),
        ({"a": kept, "b": torch.ones(3).half()}, r"model.b .* and torch.float16 \[3\]"),
        ({"a": kept}, "model.b is only in the checkpoint"),
    ):
        with pytest.raises(ValueError, match=told):
            checkpoints.load("auto", {"model": model})
        assert kept.tolist() == [0, 0]
    part = {"model": {"a": kept, "b": torch.zeros(3)}}
    assert checkpoints.load("auto", part) == {}
    assert bits(part) == bits({"a": torch.ones(2), "b": torch.ones(3)})


def test_the_last_saved_are_kept_also_after_going_back(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in (100, 200, 300):
        checkpoints.save(step, make(step), {"step": step})
    checkpoints.wait()
    assert checkpoints.steps() == [200, 300]
    # Someone goes back to 200: what is saved from there on is newer than 300.
    checkpoints.save(220, make(220), {"step": 220})
    checkpoints.wait()
    assert checkpoints.steps() == [220, 300]
    assert loaded(tmp_path, make(1)) == (bits(make(220)), {"step": 220})
    checkpoints.save(240, make(240), {"step": 240})
    checkpoints.wait()
    assert checkpoints.steps() == [220, 240]
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000220", "step-00000240"]


def test_incomplete_folders_do_not_count_and_leftovers_of_dead_runs_go(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, asynchronous=False)
    for step in (1, 2):
        checkpoints.save(step, make(step), {})
    (tmp_path / "step-00000002" / "extra.json").unlink()
    (tmp_path / ".tmp-step-00000003-0a").mkdir()
    (tmp_path / ".tmp-step-00000003-0a" / "__0_0.distcp").write_bytes(b"half")
    (tmp_path / ".tmp-latest-0b").write_bytes(b"step")
    shutil.copytree(tmp_path / "step-00000001", tmp_path / ".trash-step-00000000-0c")
    (tmp_path / "notes.txt").write_text("mine")
    assert checkpoints.steps() == [1]
    checkpoints.save(3, make(3), {})
    assert sorted(os.listdir(tmp_path)) == ["latest", "notes.txt", *(f"step-0000000{i}" for i in (1, 2, 3))]
    assert checkpoints.steps() == [1, 3]
    checkpoints.save(4, make(4), {})
    assert sorted(os.listdir(tmp_path)) == ["latest", "notes.txt", "step-00000003", "step-00000004"]


def test_one_that_waits_for_its_successor_counts(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, asynchronous=False)
    save(checkpoints, 1)
    # Where a kill leaves it, in the middle of saving step 1 again.
    (tmp_path / "step-00000001").rename(tmp_path / ".aside-step-00000001")
    assert checkpoints.steps() == [1]
    assert loaded(tmp_path, make(1)) == (bits(make(1)), {"saved": 1})
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]
    save(checkpoints, 1)
    assert sorted(os.listdir(tmp_path)) == ["latest", "step-00000001", "step-00000002"]


def test_all_is_on_the_disk_before_a_checkpoint_gets_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, rename = os.fsync, os.rename
    events: list[str] = []

    def logged_fsync(descriptor: int) -> None:
        events.append(f"sync {Path(os.readlink(f'/proc/self/fd/{descriptor}')).name}")
        fsync(descriptor)

    def logged_rename(source: Path, target: Path) -> None:
        events.append(f"rename {Path(target).name}")
        rename(source, target)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(os, "rename", logged_rename)
    Checkpoints(tmp_path / "c", asynchronous=False).save(7, make(1), {})
    named = events.index("rename step-00000007")
    before = [event for event in events[:named] if not event.startswith("sync .tmp-latest")]
    assert before[0] == "sync __0_0.distcp"
    assert before[-3:-1] == ["sync extra.json", "sync manifest.json"]
    assert before[-1].startswith("sync .tmp-step-00000007-")
    assert {"sync .metadata.tmp", "rename .metadata"} < set(before)
    assert events[named + 1 :] == ["sync c", "rename latest", "sync c"]


class Killed(BaseException):
    """Passes every handler of errors, as SIGKILL does."""


@pytest.mark.parametrize("step", [1, 2])
def test_a_kill_before_any_file_operation_loses_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    """Also with one checkpoint kept, and (step 1) while that very one is saved anew."""
    good = ((bits(make(1)), {"saved": 1}), (bits(make(2)), {"saved": 2}))
    for moment in range(100):
        folder = tmp_path / str(moment)
        checkpoints = Checkpoints(folder, keep=1, asynchronous=False)
        checkpoints.save(1, make(1), {"saved": 1})
        with monkeypatch.context() as patch:
            left = moment

            def deadly(operation: Callable[..., Any]) -> Callable[..., Any]:
                def run(*args: Any, **keywords: Any) -> Any:
                    nonlocal left
                    left -= 1
                    if left < 0:
                        raise Killed
                    return operation(*args, **keywords)

                return run

            for name in ("mkdir", "fsync", "rename", "unlink", "rmdir"):
                patch.setattr(os, name, deadly(getattr(os, name)))
            try:
                checkpoints.save(step, make(2), {"saved": 2})
            except Killed:
                pass
            else:
                break
        assert loaded(folder, make(1)) in good
        Checkpoints(folder, keep=1, asynchronous=False).save(3, make(3), {})
        assert sorted(os.listdir(folder)) == ["latest", "step-00000003"]
    assert 12 < moment < 99
    assert loaded(folder, make(1)) == good[1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, stderr=subprocess.DEVNULL).returncode != 0:
        pytest.skip("a small tmpfs needs the right to mount")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def refusal(checkpoints: Checkpoints, folder: Path) -> str | None:
    """What a save said that failed, now or in the wait, and left no trace; None if it went well."""
    before = tree(folder)
    try:
        save(checkpoints, 9)
    except SaveError as error:
        assert tree(folder) == before
        assert not [path for path in folder.rglob("*") if ".tmp" in path.name]
        # It was told once.
        checkpoints.wait()
        return str(error)
    return None


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_full_disk_fails_the_save_and_nothing_else(small_disk: Path, asynchronous: bool) -> None:
    checkpoints = Checkpoints(small_disk / "c", asynchronous=asynchronous)
    save(checkpoints, 1)
    page = os.sysconf("SC_PAGESIZE")
    with (small_disk / "ballast").open("wb", buffering=0) as ballast:
        with contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(page))
        full = ballast.tell()
        # With each page that is freed it is full a little later: tensors, index, extra, manifest, latest.
        for pages in range(100):
            ballast.truncate(full - pages * page)
            told = refusal(checkpoints, small_disk / "c")
            if told is None:
                break
            assert told.startswith("checkpoint 9 could not be saved: [Errno 28] No space left on device")
            assert "\n" not in told
            assert loaded(small_disk / "c", make(1)) == (bits(make(1)), {"saved": 1})
    assert 6 < pages < 99
    assert checkpoints.steps() == [1, 9]


def fill(disk: Path) -> None:
    """Leaves one page, for `latest`."""
    page = os.sysconf("SC_PAGESIZE")
    with (disk / "ballast").open("ab", buffering=0) as ballast:
        with contextlib.suppress(OSError):
            while True:
                ballast.write(bytes(page))
        ballast.truncate(ballast.tell() - page)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_on_a_full_disk_the_oldest_that_is_not_permanent_makes_room(
    small_disk: Path, asynchronous: bool
) -> None:
    told: list[str] = []
    given = {"permanent": 2, "asynchronous": asynchronous, "warn": told.append}
    checkpoints = Checkpoints(small_disk / "c", keep=3, **given)  # type: ignore[arg-type]
    for step in (1, 2, 3):
        save(checkpoints, step)
    (small_disk / "c" / ".tmp-step-00000004-0a").mkdir()
    (small_disk / "c" / ".tmp-step-00000004-0a" / "__0_0.distcp").write_bytes(bytes(100))
    for step, left in ((4, [2, 3, 4]), (5, [2, 4, 5])):
        fill(small_disk)
        save(checkpoints, step)
        assert checkpoints.steps() == left and loaded(small_disk / "c", make(1))[0] == bits(make(step))
    gone = [(".tmp-step-00000004-0a", 4), ("step-00000001", 4), ("step-00000003", 5)]
    assert told == [f"the disk is full: {name} was deleted for checkpoint {step}" for name, step in gone]
    assert sorted(os.listdir(small_disk / "c")) == ["latest", *(f"step-0000000{i}" for i in (2, 4, 5))]


def test_permanent_ones_stay_beside_the_last(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path, keep=2, permanent=4, asynchronous=False)
    for step in range(1, 11):
        checkpoints.save(step, make(step), {})
    assert checkpoints.steps() == [4, 8, 9, 10]
    with pytest.raises(ValueError, match="checkpoint.permanent=-1: it must be 0"):
        Checkpoints(tmp_path, permanent=-1)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_file_that_cannot_grow_fails_the_save_and_nothing_else(tmp_path: Path, asynchronous: bool) -> None:
    checkpoints = Checkpoints(tmp_path, asynchronous=asynchronous)
    save(checkpoints, 1)
    with small_files(4_000):
        assert "File too large" in str(refusal(checkpoints, tmp_path))
    save(checkpoints, 2)
    assert checkpoints.steps() == [1, 2]


def test_a_failed_save_is_told_before_the_next_one_begins(tmp_path: Path) -> None:
    checkpoints = Checkpoints(tmp_path)
    with small_files(4_000):
        checkpoints.save(1, make(1), {})
        with pytest.raises(SaveError, match="^checkpoint 1 could not be saved"):
            checkpoints.save(2, make(2), {})
    save(checkpoints, 3)
    assert checkpoints.steps() == [3]


def test_a_read_only_folder_fails_the_save(small_disk: Path) -> None:
    checkpoints = Checkpoints(small_disk / "c", asynchronous=False)
    checkpoints.save(1, make(1), {})
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert "Read-only file system" in str(refusal(checkpoints, small_disk / "c"))


def test_a_file_in_the_folders_place_fails_saves_and_loads(tmp_path: Path) -> None:
    (tmp_path / "c").write_text("not a folder")
    with pytest.raises(SaveError, match="Not a directory"):
        Checkpoints(tmp_path / "c", asynchronous=False).save(1, make(1), {})
    with pytest.raises(OSError, match="Not a directory"):
        Checkpoints(tmp_path / "c").load("auto", make(1))
    assert (tmp_path / "c").read_text() == "not a folder"
