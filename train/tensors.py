"""The tensors of a checkpoint, written and read with torch.distributed.checkpoint (DCP), running no code."""

import pickle
from collections.abc import Collection, Iterator, Mapping, Sequence
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch.distributed.checkpoint import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    FileSystemReader,
    FileSystemWriter,
)
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    _MEM_FORMAT_ENCODING,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult

from .manifest import DamagedCheckpoint

_CLASSES = (
    Metadata,
    TensorStorageMetadata,
    TensorProperties,
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    _MEM_FORMAT_ENCODING,
    _StorageInfo,
    torch.Size,
)
_DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16,
    torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu,
    torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint64, torch.uint32, torch.uint16, torch.uint8,
    torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
# All that a metadata file may name. Layouts are pickled as a call of `_get_layout`; here all are strided.
_NAMES: dict[tuple[str, str], Any] = {
    **{(cls.__module__, cls.__qualname__): cls for cls in _CLASSES},
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in _DTYPES},
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"names {module}.{name}, which has no place in it") from None


class SafeReader(FileSystemReader):
    """Reads a DCP folder; `.metadata`, a pickle, may name nothing but what such a file consists of."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises pickle.UnpicklingError for a file that names anything else, or is no metadata of tensors."""
        with (Path(self.path) / ".metadata").open("rb") as stream:
            metadata = _Unpickler(stream).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError("holds no metadata")
        return metadata


class SafeLoadPlanner(DefaultLoadPlanner):
    """Loads tensors only: DCP's own planner unpickles, without limits, what metadata calls bytes."""

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> NoReturn:
        raise pickle.UnpicklingError(f"{read_item.dest_index.fqn} is no tensor")


class _SavePlanner(DefaultSavePlanner):
    """Plans over live tensors and may then hold copies of what this rank writes."""

    def __init__(self) -> None:
        super().__init__()
        self._copies: dict[MetadataIndex, torch.Tensor] = {}

    def copy(self, items: Sequence[WriteItem]) -> None:
        live = {item.index: self.lookup_object(item.index) for item in items}
        self._copies = {index: tensor.detach().to("cpu", copy=True) for index, tensor in live.items()}

    def lookup_object(self, index: MetadataIndex) -> Any:
        copied = self._copies.get(index)
        return super().lookup_object(index) if copied is None else copied


class _Writer(FileSystemWriter):
    def storage_meta(self) -> StorageMeta:
        # DCP's own holds the absolute path of the folder, which is about to be renamed.
        return StorageMeta()


class TensorSave:
    """One rank's share of writing `state`, nested dicts of tensors and DTensors.

    Every rank makes a `plan`; `merge` (one rank) decides who writes what, replicated tensors once; `accept`
    takes the rank's share; `write` writes it; `finish` (one rank) writes the index. Plain tensors are taken
    to be equal on all ranks. Raises ValueError for anything but a tensor, by its key.
    """

    def __init__(self, state: Mapping[str, Any], *, coordinator: bool) -> None:
        for path, value in _leaves(state):
            if not isinstance(value, torch.Tensor):
                raise ValueError(
                    f"state{_keys(path)} is of type {type(value).__name__}; only tensors go into state,"
                    " numbers and text belong in extra"
                )
        self._planner = _SavePlanner()
        self._planner.set_up_planner(dict(state), is_coordinator=coordinator)
        self._share: SavePlan | None = None

    def plan(self) -> SavePlan:
        return self._planner.create_local_plan()

    def merge(self, plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = self._planner.create_global_plan(plans)
        return _Writer("").prepare_global_plan(plans), metadata

    def accept(self, share: SavePlan, *, copy: bool) -> None:
        """copy: hold copies in CPU memory, so that the tensors may change before `write`."""
        self._share = self._planner.finish_plan(share)
        if copy:
            self._planner.copy(self._share.items)

    def write(self, folder: Path) -> list[WriteResult]:
        """Writes and fsyncs this rank's file."""
        assert self._share is not None
        return _Writer(folder).write_data(self._share, self._planner).wait()

    def finish(self, folder: Path, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        _Writer(folder).finish(metadata, results)


class TensorLoad:
    """Reads the tensors of a checkpoint folder into `state`, in place, whatever ranks wrote them and hold it.

    Top-level keys that `state` lacks are left out; below those that it has, everything must match. Raises
    `DamagedCheckpoint` if the index cannot be trusted and ValueError if tensors, shapes or dtypes do not fit.
    """

    def __init__(self, folder: Path, files: Collection[str], state: dict[str, Any]) -> None:
        self._folder = folder
        self._reader = SafeReader(folder)
        try:
            metadata = self._reader.read_metadata()
            _check_index(metadata, files)
        except Exception as error:
            # A damaged pickle raises almost anything.
            raise DamagedCheckpoint(f"{folder}: .metadata cannot be read: {error}") from error
        _check_fit(folder, metadata, state)
        self._planner = SafeLoadPlanner()
        self._planner.set_up_planner(state, metadata, is_coordinator=False)
        self._reader.set_up_storage_reader(metadata, is_coordinator=False)

    def read(self) -> None:
        """Fills the tensors. After an error they hold anything."""
        try:
            plan = self._planner.finish_plan(self._planner.create_local_plan())
            self._reader.read_data(plan, self._planner).wait()
        except pickle.UnpicklingError as error:
            # Torch's own words propose to load it regardless.
            raise DamagedCheckpoint(f"{self._folder}: it holds something else than tensors") from error
        except Exception as error:
            raise DamagedCheckpoint(f"{self._folder}: the tensors cannot be read: {error}") from error


def _leaves(state: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    if not isinstance(state, Mapping):
        yield path, state
        return
    for key, value in state.items():
        if type(key) not in (str, int):
            raise ValueError(f"state{_keys(path)} has the key {key!r}; keys are strings or whole numbers")
        yield from _leaves(value, (*path, key))


def _keys(path: tuple[Any, ...]) -> str:
    return "".join(f"[{key!r}]" for key in path)


def _check_index(metadata: Metadata, files: Collection[str]) -> None:
    """Every tensor is stored whole, and nothing points out of the folder or at code."""
    for name, tensor in metadata.state_dict_metadata.items():
        if not isinstance(tensor, TensorStorageMetadata):
            raise pickle.UnpicklingError(f"{name} is no tensor")
        if sum(prod(chunk.sizes) for chunk in tensor.chunks) != prod(tensor.size):
            raise pickle.UnpicklingError(f"{name} is not stored whole")
        if not metadata.planner_data[name]:
            raise pickle.UnpicklingError(f"{name} has no place in the state")
    for index, place in metadata.storage_data.items():
        if place.relative_path not in files or place.transform_descriptors:
            raise pickle.UnpicklingError(
                f"{index.fqn} is stored in {place.relative_path}, no file of this checkpoint"
            )


def _check_fit(folder: Path, metadata: Metadata, state: Mapping[str, Any]) -> None:
    wanted = {".".join(map(str, path)): tensor for path, tensor in _leaves(state)}
    # All are tensors, as _check_index made sure.
    stored: dict[str, Any] = metadata.state_dict_metadata
    tops = {str(key) for key in state}
    paths = metadata.planner_data
    wrong = [f"{name} is not in the checkpoint" for name in wanted if name not in stored]
    wrong += [
        f"{name} is only in the checkpoint"
        for name in stored
        if name not in wanted and str(paths[name][0]) in tops
    ]
    for name in wanted.keys() & stored.keys():
        ours, theirs = wanted[name], stored[name]
        if (ours.shape, ours.dtype) != (theirs.size, theirs.properties.dtype):
            wrong.append(
                f"{name} is {theirs.properties.dtype} {list(theirs.size)} in the checkpoint"
                f" and {ours.dtype} {list(ours.shape)} in this run"
            )
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        raise ValueError(f"{folder} is of another model or optimizer: {'; '.join(sorted(wrong)[:4])}{more}")
