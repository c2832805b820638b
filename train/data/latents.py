"""Latents of a VAE, or any arrays, with classes or embeddings of texts: safetensors, npz, WebDataset tars."""

import hashlib
import io
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from .archive import Blob, Files, groups, listing
from .check import fraction, switch, whole
from .clip import Clip, Floats, Traits
from .corpus import Bad
from .images import label_of
from .index import Index, kept
from .order import Parted
from .tensorfile import Array, TensorFile

_FILES = (".safetensors", ".npz")
# What a file may have beside its latents.
_BESIDE = ("labels", "text", "text_lengths", "pooled")
# Of what the index says of a record; another number makes the old ones unused.
_VERSION = 2


class Latents(Parted):
    """Arrays [C, F, H, W], or [C, H, W] for one frame; a `Clips`. They are given as (x - shift) * scale.

    A `.safetensors` (mapped into memory) or `.npz` (held in memory) has `latents` [n, C, H, W] or
    [n, C, F, H, W], and may have `labels` [n], `text` [n, J, E], with `text_lengths` [n] where not all J
    words are text, and `pooled` [n, P]. A sample of a WebDataset tar has `.npy` and may have `.cls`,
    `.text.npy` [J, E] of any number of words and `.pooled.npy` [P]. One is held out by the hash of its
    content: copies stay on one side.

    Args:
        path: A folder, read whole in the order of its names, or one file.
        text: Give texts and pooled vectors where there are any.
        shift, scale: So that the deviation is about 1; for Stable Diffusion's VAE 0 and 0.18215.
        seed: Of the order.
        cache: Folder for the list of what is good, made when the files are first read.
        held_out: Share of the latents that is held out.
        bad_budget: Share of the records that may be bad. Up to 10 are always skipped, unless this is 0.
        buckets, pack: How latents of several shapes come together, as in `Traits`.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: A setting is wrong, a file is damaged, or too many records are bad.
    """

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        text: bool = True,
        shift: float = 0.0,
        scale: float = 1.0,
        seed: int = 0,
        cache: str | os.PathLike[str],
        held_out: float = 0.05,
        bad_budget: float = 0.01,
        buckets: int | None = None,
        pack: int | None = None,
    ) -> None:
        if not np.isfinite([shift, scale]).all() or scale == 0:
            raise ValueError(f"data.shift={shift}, data.scale={scale} must be finite, and the scale not 0")
        self._shift, self._scale = float(shift), float(scale)
        seed, self._path = whole("data.seed", seed, 0), os.path.abspath(str(path))
        fraction("data.bad_budget", bad_budget, ends=True)
        files = listing(path, (*_FILES, ".tar"), "safetensors, npz or WebDataset tars of latents")
        self._open = {name: TensorFile(files.root / name) for name in files.names if name.endswith(_FILES)}
        key = ["latents", _VERSION, str(files.root), files.state()]
        self._index = kept(cache, key, lambda: Index.of(_records(files, self._open)))
        self._index.check(bad_budget, self._path)
        rows = self._index.rows if switch("data.text", text) else [_mute(row) for row in self._index.rows]
        self._index = Index(rows, self._index.bad)
        _check_alike(rows, self._path)
        super().__init__(self._index.split(fraction("data.held_out", held_out, ends=False)), seed)
        self.classes = max(row["class"] for row in rows) + 1
        shapes = sorted({tuple(row["shape"]) for row in rows})
        self.traits = Traits(tuple(shapes), _width(rows[0]), rows[0]["pooled"], buckets, pack)

    def item(self, index: int) -> Clip:
        """Raises ValueError or OSError, which name the file, if it has changed since it was listed."""
        row = self._index.rows[self._order.record(index)]
        latent = _framed(self._read(row, "latents")).astype(np.float32)
        text = pooled = None
        if row["text"] is not None:
            text = self._read(row, "text")[: row["text"][0]].astype(np.float32)
        if row["pooled"] is not None:
            pooled = self._read(row, "pooled").astype(np.float32)
        pixels: Floats = (latent - np.float32(self._shift)) * np.float32(self._scale)
        return Clip(pixels, row["class"], text, pooled)

    def _read(self, row: dict[str, Any], name: str) -> Array:
        if "file" in row:
            return self._open[row["file"]].row(name, row["row"])
        return _npy(Blob(**row["blobs"][name]))

    def shape(self, index: int) -> tuple[int, int, int, int]:
        channels, frames, height, width = self._index.rows[self._order.record(index)]["shape"]
        return channels, frames, height, width

    def describe(self) -> dict[str, Any]:
        return self._index.describe() | {
            "corpus": "latents",
            "path": self._path,
            "part": self._part,
            "classes": self.classes,
            "text": self.traits.text,
            "pooled": self.traits.pooled,
            "buckets": self.traits.buckets,
            "pack": self.traits.pack,
            "shift": self._shift,
            "scale": self._scale,
            "samples": len(self),
        }


def _check_alike(rows: list[dict[str, Any]], path: str) -> None:
    """Channels and widths of texts must be the same; frames, height and width may differ (see `Traits`)."""
    for name, found in (
        ("channels", {row["shape"][0] for row in rows}),
        ("text", {_width(row) for row in rows}),
        ("pooled", {row["pooled"] for row in rows}),
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
    for other in _BESIDE:
        if other in file and file.shape(other)[:1] != (count,):
            raise ValueError(f"{file.path}: {other} is {file.shape(other)}, but there are {count} latents")
    for i in range(count):
        parts = {part: file.row(part, i) for part in ("latents", *_BESIDE) if part in file}
        found = _checked(f"{name}:{i}", parts)
        yield found if isinstance(found, Bad) else found | {"file": name, "row": i}


def _tarred(location: str, members: dict[str, Blob]) -> dict[str, Any] | Bad:
    latent = members.get("npy") or members.get("latent.npy")
    if latent is None:
        return Bad(location, f"no .npy in the sample: {', '.join(members)}")
    named = {"text": members.get("text.npy"), "pooled": members.get("pooled.npy")}
    blobs = {"latents": latent} | {name: blob for name, blob in named.items() if blob is not None}
    try:
        parts = {name: _npy(blob) for name, blob in blobs.items()}
        if {"cls", "json"} & members.keys():
            parts["labels"] = np.array(label_of(members))
        found = _checked(location, parts)
    except (OSError, ValueError) as error:
        return Bad(location, " ".join(str(error).split()))
    if isinstance(found, Bad):
        return found
    return found | {"blobs": {name: vars(blob) for name, blob in blobs.items()}}


def _checked(location: str, parts: dict[str, Array]) -> dict[str, Any] | Bad:
    """What the index says of a record."""
    latent, label = parts["latents"], parts.get("labels", np.array(0))
    text, pooled = parts.get("text"), parts.get("pooled")
    if latent.ndim not in (3, 4) or 0 in latent.shape:
        return Bad(location, f"shape {latent.shape} is neither [C, H, W] nor [C, F, H, W]")
    if text is not None and (text.ndim != 2 or 0 in text.shape):
        return Bad(location, f"the text's shape {text.shape} is not [J, E] with a word at least")
    if pooled is not None and pooled.ndim != 1:
        return Bad(location, f"the pooled text's shape {pooled.shape} is not [P]")
    if text is not None:
        words = parts.get("text_lengths", np.array(len(text)))
        if words.dtype.kind not in "iu" or not 1 <= int(words) <= len(text):
            return Bad(location, f"the text's length is {words!s}, not a whole number from 1 to {len(text)}")
        text = text[: int(words)]
    if any(not np.isfinite(x.astype(np.float32)).all() for x in (latent, text, pooled) if x is not None):
        return Bad(location, "not all values are finite")
    if label.ndim or label.dtype.kind not in "iu" or int(label) < 0:
        return Bad(location, f"the class is {label!s} ({label.dtype}), not a whole number of at least 0")
    content = hashlib.sha256(str(latent.shape).encode() + np.ascontiguousarray(latent).tobytes())
    return {
        "class": int(label),
        "shape": list(_framed(latent).shape),
        "text": None if text is None else list(text.shape),
        "pooled": None if pooled is None else len(pooled),
        "digest": content.hexdigest(),
    }


def _width(row: dict[str, Any]) -> int | None:
    """Of the text's embeddings."""
    return None if row["text"] is None else row["text"][1]


def _mute(row: dict[str, Any]) -> dict[str, Any]:
    return row | {"text": None, "pooled": None}


def _framed(latent: Array) -> Array:
    return latent[:, None] if latent.ndim == 3 else latent


def _npy(blob: Blob) -> Array:
    try:
        found: Array = np.load(io.BytesIO(blob.read()), allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{Path(blob.path)}: {blob.location} is no npy: {error}") from None
    return found
