"""Latents of a VAE, or any arrays, with classes or embeddings of texts: safetensors, npz, WebDataset tars."""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .archive import Blob, Files, groups, listing
from .check import fraction, whole
from .clip import Clip
from .corpus import Bad
from .images import label_of
from .index import Index, kept
from .order import Parted
from .tensorfile import Array, TensorFile

_FILES = (".safetensors", ".npz")


class Latents(Parted):
    """Arrays [C, F, H, W], or [C, H, W] for one frame; a `Clips`. They are given as (x - shift) * scale.

    A `.safetensors` (mapped into memory) or `.npz` (held in memory) has `latents` [n, C, H, W] or
    [n, C, F, H, W], and may have `labels` [n] and `text` [n, J, E]. A sample of a WebDataset tar has
    `.npy` and may have `.cls` and `.text.npy`. One is held out by the hash of its content: copies stay on one
    side.

    Args:
        path: A folder, read whole in the order of its names, or one file.
        shift, scale: So that the deviation is about 1; for Stable Diffusion's VAE 0 and 0.18215.
        seed: Of the order.
        cache: Folder for the list of what is good, made when the files are first read.
        held_out: Share of the latents that is held out.
        bad_budget: Share of the records that may be bad. Up to 10 are always skipped, unless this is 0.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: A setting is wrong, a file is damaged, or too many records are bad.
    """

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        shift: float = 0.0,
        scale: float = 1.0,
        seed: int = 0,
        cache: str | os.PathLike[str],
        held_out: float = 0.05,
        bad_budget: float = 0.01,
    ) -> None:
        if not np.isfinite([shift, scale]).all() or scale == 0:
            raise ValueError(f"data.shift={shift}, data.scale={scale} must be finite, and the scale not 0")
        self._shift, self._scale = float(shift), float(scale)
        seed, self._path = whole("data.seed", seed, 0), os.path.abspath(str(path))
        fraction("data.bad_budget", bad_budget, ends=True)
        files = listing(path, (*_FILES, ".tar"), "safetensors, npz or WebDataset tars of latents")
        self._open = {name: TensorFile(files.root / name) for name in files.names if name.endswith(_FILES)}
        key = ["latents", str(files.root), files.state()]
        self._index = kept(cache, key, lambda: Index.of(_records(files, self._open)))
        self._index.check(bad_budget, self._path)
        _check_alike(self._index.rows, self._path)
        super().__init__(self._index.split(fraction("data.held_out", held_out, ends=False)), seed)
        self.classes = max(row["class"] for row in self._index.rows) + 1

    def item(self, index: int) -> Clip:
        """Raises ValueError or OSError, which name the file, if it has changed since it was listed."""
        row = self._index.rows[self._order.record(index)]
        if "file" in row:
            file = self._open[row["file"]]
            latent, text = file.row("latents", row["row"]), None
            if row["text"] is not None:
                text = file.row("text", row["row"])
        else:
            latent = _npy(Blob(**row["blob"]))
            text = None if row["text"] is None else _npy(Blob(**row["words"]))
        pixels = (_framed(latent).astype(np.float32) - np.float32(self._shift)) * np.float32(self._scale)
        return Clip(pixels, row["class"], None if text is None else text.astype(np.float32))

    def shape(self, index: int) -> tuple[int, int, int, int]:
        channels, frames, height, width = self._index.rows[self._order.record(index)]["shape"]
        return channels, frames, height, width

    def describe(self) -> dict[str, Any]:
        return self._index.describe() | {
            "corpus": "latents",
            "path": self._path,
            "part": self._part,
            "classes": self.classes,
            "text": self._index.rows[0]["text"],
            "shift": self._shift,
            "scale": self._scale,
            "samples": len(self),
        }


def _check_alike(rows: list[dict[str, Any]], path: str) -> None:
    """Channels and texts must be of one shape; frames, height and width may differ (see `bucket`)."""
    for name, found in (
        ("channels", {row["shape"][0] for row in rows}),
        ("text", {None if row["text"] is None else tuple(row["text"]) for row in rows}),
    ):
        if len(found) > 1:
            listed = ", ".join(sorted(map(str, found)))
            raise ValueError(
                f"data.path={path!r}: the latents differ in {name} ({listed}); one model takes one"
            )


def _records(files: Files, opened: dict[str, TensorFile]) -> Iterator[dict[str, Any] | Bad]:
    for name in files.names:
        if name in opened:
            yield from _rows(name, opened[name])
        else:
            for location, members in groups(files, name):
                yield _tarred(location, members)


def _rows(name: str, file: TensorFile) -> Iterator[dict[str, Any] | Bad]:
    if "latents" not in file:
        raise ValueError(f"{file.path} has no array 'latents': it has {', '.join(file.names()) or 'none'}")
    count = file.shape("latents")[0] if file.shape("latents") else 0
    for other in ("labels", "text"):
        if other in file and file.shape(other)[:1] != (count,):
            raise ValueError(f"{file.path}: {other} is {file.shape(other)}, but there are {count} latents")
    for i in range(count):
        text = file.row("text", i) if "text" in file else None
        label = file.row("labels", i) if "labels" in file else np.array(0)
        found = _checked(f"{name}:{i}", file.row("latents", i), label, text)
        yield found if isinstance(found, Bad) else found | {"file": name, "row": i}


def _tarred(location: str, members: dict[str, Blob]) -> dict[str, Any] | Bad:
    latent = members.get("npy") or members.get("latent.npy")
    if latent is None:
        return Bad(location, f"no .npy in the sample: {', '.join(members)}")
    words = members.get("text.npy")
    try:
        label = label_of(members) if {"cls", "json"} & members.keys() else 0
        text = None if words is None else _npy(words)
        found = _checked(location, _npy(latent), np.array(label), text)
    except (OSError, ValueError) as error:
        return Bad(location, " ".join(str(error).split()))
    if isinstance(found, Bad):
        return found
    return found | {"blob": vars(latent), "words": None if words is None else vars(words)}


def _checked(location: str, latent: Array, label: Array, text: Array | None) -> dict[str, Any] | Bad:
    """What the index says of a record."""
    if latent.ndim not in (3, 4) or 0 in latent.shape:
        return Bad(location, f"shape {latent.shape} is neither [C, H, W] nor [C, F, H, W]")
    if text is not None and text.ndim != 2:
        return Bad(location, f"the text's shape {text.shape} is not [J, E]")
    if any(not np.isfinite(x.astype(np.float32)).all() for x in (latent, text) if x is not None):
        return Bad(location, "not all values are finite")
    if label.ndim or label.dtype.kind not in "iu" or int(label) < 0:
        return Bad(location, f"the class is {label!s} ({label.dtype}), not a whole number of at least 0")
    content = hashlib.sha256(str(latent.shape).encode() + np.ascontiguousarray(latent).tobytes())
    return {
        "class": int(label),
        "shape": list(_framed(latent).shape),
        "text": None if text is None else list(text.shape),
        "digest": content.hexdigest(),
    }


def _framed(latent: Array) -> Array:
    return latent[:, None] if latent.ndim == 3 else latent


def _npy(blob: Blob) -> Array:
    try:
        found: Array = np.load(io.BytesIO(blob.read()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{Path(blob.path)}: {blob.location} is no npy: {error}") from None
    return found
