"""Arrays by name in a file: safetensors, mapped into memory, and NumPy's npz."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[Any]

_KINDS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U8": "u1", "BOOL": "?",
}  # fmt: skip
# The greatest header that the format's own reader takes.
_LONGEST_HEADER = 100_000_000


class TensorFile:
    """The arrays of a file. bfloat16 comes as float32, row by row, since NumPy has no such type.

    Raises:
        ValueError: The file is damaged, or of another kind.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._arrays, self._bfloat16 = _npz(path) if path.suffix == ".npz" else _safetensors(path)

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self) -> list[str]:
        return sorted(self._arrays)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._arrays[name].shape)

    def dtype(self, name: str) -> torch.dtype:
        """What an array is stored as."""
        if name in self._bfloat16:
            return torch.bfloat16
        return torch.from_numpy(np.empty(0, self._arrays[name].dtype)).dtype

    def tensor(self, name: str) -> torch.Tensor:
        """A whole array as it is stored, in memory."""
        return self.part(name, ())

    def part(self, name: str, box: tuple[slice, ...]) -> torch.Tensor:
        """What is in the box of an array, as it is stored; of a safetensors file only that is read."""
        return torch.from_numpy(np.array(self._arrays[name][box])).view(self.dtype(name))

    def row(self, name: str, i: int) -> Array:
        """Row i of an array, in memory."""
        row = np.array(self._arrays[name][i])
        if name in self._bfloat16:
            # bfloat16 is the upper half of a float32
            return (row.astype(np.uint32) << 16).view(np.float32)
        return row


def _npz(path: Path) -> tuple[dict[str, Array], set[str]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}, set()
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} cannot be read as npz: {error}") from error


def _safetensors(path: Path) -> tuple[dict[str, Array], set[str]]:
    """Format: the header's length as uint64, a JSON header, the data
    (https://github.com/huggingface/safetensors, "Format").
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"its header would be of {length} bytes in a file of {size}")
            header = json.loads(file.read(length))
        header.pop("__metadata__", None)
        found = {}
        for name, said in header.items():
            kind, (first, last) = np.dtype(_KINDS[said["dtype"]]), said["data_offsets"]
            count = int(np.prod(said["shape"], dtype=np.int64))
            if first < 0 or 8 + length + last > size or last - first != count * kind.itemsize:
                raise ValueError(f"{name} is cut short or of another size than its header says")
            found[name] = _mapped(path, kind, 8 + length + first, tuple(said["shape"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read as safetensors: {error}") from error
    return found, {name for name, said in header.items() if said["dtype"] == "BF16"}


def _mapped(path: Path, kind: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> Array:
    if 0 in shape:
        return np.empty(shape, kind)
    return np.memmap(path, dtype=kind, mode="r", offset=offset, shape=shape)
