import contextlib
import errno
import io
import itertools
import multiprocessing
import os
import pickle
import random
import shutil
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata

from longspan.train.checkpoint import Checkpoints
from longspan.train.manifest import DamagedCheckpoint, File, Manifest
from states import State, bits, blank, loaded, make, tree
from world import PRELOAD

NAMES = [".metadata", "__0_0.distcp", "extra.json", "manifest.json"]


def fill(folder: Path, *steps: int) -> Path:
    """Checkpoints of `steps`; the folder of the last."""
    checkpoints = Checkpoints(folder, asynchronous=False)
    for step in steps:
        checkpoints.save(step, make(step), {"saved": step})
    return folder / f"step-{steps[-1]:08d}"


def reason(folder: Path) -> str:
    """Why the only checkpoint in `folder` is refused."""
    with pytest.raises(DamagedCheckpoint) as caught:
        Checkpoints(folder, warn=lambda line: None).load("auto", make(1))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", NAMES)
def test_one_flipped_bit_in_any_file_is_detected(tmp_path: Path, name: str) -> None:
    path = fill(tmp_path, 1) / name
    data = path.read_bytes()
    draw = random.Random(name)
    for _ in range(40):
        position = draw.randrange(8 * len(data))
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        path.write_bytes(flipped)
        assert f"step-00000001: {name}" in reason(tmp_path)
    path.write_bytes(data)
    assert loaded(tmp_path, make(1)) == (bits(make(1)), {"saved": 1})


def test_every_bit_of_the_manifest_is_protected() -> None:
    manifest = Manifest(120, 3, {"__0_0.distcp": File(4096, "0f" * 32), ".metadata": File(17, "a1" * 32)})
    data = manifest.render()
    assert Manifest.parse(data) == manifest
    for position in range(8 * len(data)):
        flipped = bytearray(data)
        flipped[position // 8] ^= 1 << position % 8
        assert Manifest.parse(bytes(flipped)) is None
    for other in (data + b"\n", data[:-1], data.replace(b" ", b""), b"", b"null", b"[" * 100_000):
        assert Manifest.parse(other) is None


@pytest.mark.parametrize("name", NAMES)
def test_a_file_cut_short_or_missing_is_named(tmp_path: Path, name: str) -> None:
    path = fill(tmp_path, 1) / name
    data = path.read_bytes()
    for length in (0, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:length])
        assert name in reason(tmp_path)
        assert Checkpoints(tmp_path).steps() == []
    path.unlink()
    assert f"{name} is missing" in reason(tmp_path)


def test_what_does_not_belong_to_a_checkpoint_is_named(tmp_path: Path) -> None:
    folder = fill(tmp_path, 1)
    (folder / "more.distcp").write_bytes(b"more")
    assert "more.distcp does not belong to it" in reason(tmp_path)
    (folder / "more.distcp").unlink()
    (folder / "extra.json").rename(tmp_path / "elsewhere.json")
    (folder / "extra.json").symlink_to(tmp_path / "elsewhere.json")
    assert "extra.json is not a regular file" in reason(tmp_path)
    (tmp_path / "elsewhere.json").rename(folder / "extra.json")
    folder.rename(tmp_path / "step-00000002")
    assert "step-00000002: it was saved as step 1" in reason(tmp_path)


def test_the_last_good_one_is_used_and_each_damaged_one_named(tmp_path: Path) -> None:
    fill(tmp_path, 1, 2, 3)
    (tmp_path / "step-00000003" / "manifest.json").unlink()
    path = tmp_path / "step-00000002" / "__0_0.distcp"
    path.write_bytes(path.read_bytes().replace(b"data", b"dato"))
    before, told = tree(tmp_path), list[str]()
    state = blank(make(1))
    assert Checkpoints(tmp_path, warn=told.append).load("auto", state) == {"saved": 1}
    assert bits(state) == bits(make(1))
    assert ["step-00000003: manifest.json" in told[0], "step-00000002: __0_0.distcp" in told[1]] == [True] * 2
    assert len(told) == 2 and tree(tmp_path) == before
    with pytest.raises(DamagedCheckpoint, match="step-00000002: __0_0.distcp does not match its SHA-256"):
        Checkpoints(tmp_path).load(str(tmp_path / "step-00000002"), state)


def test_one_that_the_disk_cannot_read_is_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = fill(tmp_path, 1, 2) / "__0_0.distcp"
    read, told = File.of, list[str]()

    def broken(path: Path) -> File:
        if path == bad:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return read(path)

    monkeypatch.setattr(File, "of", broken)
    assert Checkpoints(tmp_path, warn=told.append).load("auto", make(1)) == {"saved": 1}
    assert len(told) == 1 and "step-00000002: [Errno 5] Input/output error" in told[0]


def test_damaged_ones_alone_are_an_error_never_a_fresh_start(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    fill(tmp_path, 1, 2)
    for name in ("step-00000001", "step-00000002"):
        (tmp_path / name / "extra.json").write_text("{}")
    with pytest.raises(DamagedCheckpoint, match="of 2 checkpoints none is whole .* resume=never"):
        Checkpoints(tmp_path).load("auto", make(1))
    assert capfd.readouterr().err.count("skipped a damaged checkpoint: ") == 2


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., None], tuple[str]]:
        return os.mkdir, (str(self.marker),)


def plant_instead_of_the_index(folder: Path, payload: Payload) -> None:
    (folder / ".metadata").write_bytes(pickle.dumps(payload))


def plant_in_the_index(folder: Path, payload: Payload) -> None:
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    metadata.planner_data["model.weight"] = payload
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_as_a_tensor(folder: Path, payload: Payload, *, called: bool = False) -> None:
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    file = io.BytesIO()
    torch.save(payload, file)
    for index, place in metadata.storage_data.items():
        if index.fqn == "model.weight":
            place.offset, place.length = (folder / "__0_0.distcp").stat().st_size, file.tell()
    if called:
        # Then DCP's planner loads it with weights_only=False.
        metadata.state_dict_metadata["model.weight"] = BytesStorageMetadata()
        metadata.storage_data = {
            type(i)(i.fqn) if i.fqn == "model.weight" else i: p for i, p in metadata.storage_data.items()
        }
    with (folder / "__0_0.distcp").open("ab") as stream:
        stream.write(file.getvalue())
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))


def plant_as_bytes(folder: Path, payload: Payload) -> None:
    plant_as_a_tensor(folder, payload, called=True)


def plant_in_extra(folder: Path, payload: Payload) -> None:
    (folder / "extra.json").write_bytes(pickle.dumps(payload))


def sign(folder: Path) -> None:
    """The attacker's manifest, which is right."""
    old = Manifest.read(folder)
    files = {path.name: File.of(path) for path in folder.iterdir() if path.name != "manifest.json"}
    (folder / "manifest.json").write_bytes(Manifest(old.step, old.serial, files).render())


@pytest.mark.parametrize(
    ("plant", "told", "bites"),
    [
        (plant_instead_of_the_index, ".metadata cannot be read: names posix.mkdir", True),
        (plant_in_the_index, ".metadata cannot be read: names posix.mkdir", True),
        (plant_as_a_tensor, "it holds something else than tensors", False),
        (plant_as_bytes, ".metadata cannot be read: names .*BytesStorageMetadata", True),
        (plant_in_extra, "extra.json cannot be read", False),
    ],
)
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_planted_payload_does_not_run(
    tmp_path: Path, plant: Callable[[Path, Payload], None], told: str, bites: bool
) -> None:
    marker = tmp_path / "bitten"
    folder = fill(tmp_path / "c", 1, 2)
    plant(folder, Payload(marker))
    sign(folder)
    with pytest.raises(DamagedCheckpoint, match=told):
        Checkpoints(tmp_path / "c").load(str(folder), make(2))
    assert Checkpoints(tmp_path / "c", warn=lambda line: None).load("auto", make(2)) == {"saved": 1}
    assert not marker.exists()
    # DCP on its own runs what the index holds or names.
    with contextlib.suppress(CheckpointException):
        dcp.load(blank(make(2)), checkpoint_id=folder)
    assert marker.exists() == bites


@pytest.mark.parametrize("case", ["outside", "part", "transformed", "nothing", "garbage"])
def test_an_index_that_misleads_is_refused(tmp_path: Path, case: str) -> None:
    folder = fill(tmp_path, 1)
    metadata: Metadata = pickle.loads((folder / ".metadata").read_bytes())
    place = next(iter(metadata.storage_data.values()))
    if case == "outside":
        shutil.copy(folder / "__0_0.distcp", tmp_path)
        place.relative_path = "../__0_0.distcp"
    elif case == "transformed":
        place.transform_descriptors = ["stream.zstd"]
    elif case == "part":
        tensor = metadata.state_dict_metadata["model.weight"]
        tensor.chunks[0].sizes = torch.Size((4, 6))  # type: ignore[union-attr]
    data = {"nothing": pickle.dumps(None), "garbage": b"\x80\x04garbage"}.get(case) or pickle.dumps(metadata)
    (folder / ".metadata").write_bytes(data)
    sign(folder)
    assert ".metadata cannot be read" in reason(tmp_path)


def content(step: int) -> State:
    draw = torch.Generator().manual_seed(step)
    return {
        "model": {str(i): torch.randn(64, 64, generator=draw) for i in range(8)},
        "step": torch.tensor(step),
    }


def save_for_ever(folder: Path, reports: Path, asynchronous: bool) -> None:
    """Goes on from the last checkpoint; writes down each step that is saved."""
    checkpoints = Checkpoints(folder, keep=2, asynchronous=asynchronous)
    extra = checkpoints.load("auto", content(0)) or {"step": 0}
    with reports.open("ab", buffering=0) as stream:
        for step in itertools.count(extra["step"] + 1):
            checkpoints.save(step, content(step), {"step": step})
            checkpoints.wait()
            stream.write(step.to_bytes(8))


def nursery(pipe: "Connection[Any, Any]") -> None:
    """Has imported torch, once, and runs one thread: each child that it forks starts at once."""
    torch.set_num_threads(1)
    for order in iter(pipe.recv, None):
        child = os.fork()
        if child == 0:
            try:
                save_for_ever(*order)
            finally:
                os._exit(1)
        pipe.send(child)
        pipe.send(os.waitpid(child, 0)[1])


@pytest.fixture
def orders(monkeypatch: pytest.MonkeyPatch) -> Iterator["Connection[Any, Any]"]:
    # One thread in the server, from which worlds may fork later.
    monkeypatch.setenv("OPENBLAS_NUM_THREADS", "1")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    ours, theirs = context.Pipe()
    process = context.Process(target=nursery, args=(theirs,))
    process.start()
    theirs.close()
    yield ours
    ours.send(None)
    process.join(10)
    process.kill()
    ours.close()


def test_killed_at_20_moments_the_last_save_loads(tmp_path: Path, orders: "Connection[Any, Any]") -> None:
    folder, reports = tmp_path / "c", tmp_path / "reports"
    reports.touch()
    draw = random.Random(0)
    last, cut_short = 0, 0
    for life in range(20):
        reported = reports.stat().st_size
        orders.send((folder, reports, life % 2 == 1))
        child = orders.recv()
        deadline = time.monotonic() + 30
        while reports.stat().st_size == reported and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.06))
        os.kill(child, 9)
        assert orders.recv() == 9
        told = int.from_bytes(reports.read_bytes()[-8:])
        assert told > last
        cut_short += any(path.name.startswith(".tmp-") for path in folder.iterdir())
        state = blank(content(0))
        extra = Checkpoints(folder, warn=pytest.fail).load("auto", state)
        assert extra is not None and told <= extra["step"] <= told + 1
        assert bits(state) == bits(content(extra["step"]))
        last = extra["step"]
    assert cut_short >= 5
