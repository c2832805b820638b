"""Images of your own: a folder, with a folder for each class if there are classes, or WebDataset tars."""

import hashlib
import io
import json
import math
import os
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import numpy as np

from ..objective.noise import Key, Stream, bits
from .archive import Blob, Files, groups, listing
from .check import fraction, switch, whole
from .clip import Clip, Floats, Traits
from .corpus import Bad
from .index import Index, kept
from .order import Parted

_IMAGES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif")
_MODES = {1: "L", 3: "RGB"}


class Images(Parted):
    """Images [channels, 1, height, width] of one of a few sizes; a `Clips`.

    An image is scaled until it covers the size whose shape is nearest to its own, and cut at the middle. In a
    folder the class is the name of the folder below `path` (0 if there are none); in a tar it is the number
    in `.cls`, or `label` in `.json`. One is held out by the hash of its content: copies stay on one side.

    Args:
        path: A folder, read whole in the order of its names, or one file.
        sizes: Heights and widths to choose from.
        channels: 3 for colours, 1 for grey.
        flip: Mirror half of the images of training.
        seed: Of order and flips.
        cache: Folder for the list of what is good, made when the files are first read.
        held_out: Share of the images that is held out.
        bad_budget: Share of the records that may be bad. Up to 10 are always skipped, unless this is 0.
        buckets, pack: How images of several sizes come together, as in `Traits`.

    Raises:
        FileNotFoundError: There is nothing at `path`.
        ValueError: A setting is wrong, an archive is damaged, or too many records are bad.
    """

    def __init__(
        self,
        *,
        path: str | os.PathLike[str],
        sizes: Sequence[Sequence[int]] = ((256, 256),),
        channels: int = 3,
        flip: bool = True,
        seed: int = 0,
        cache: str | os.PathLike[str],
        held_out: float = 0.05,
        bad_budget: float = 0.01,
        buckets: int | None = None,
        pack: int | None = None,
    ) -> None:
        if channels not in _MODES:
            raise ValueError(f"data.channels={channels!r} must be 1 or 3")
        self._channels, self._flip = channels, switch("data.flip", flip)
        self._sizes = [_size(size, list(sizes)) for size in sizes]
        if not self._sizes:
            raise ValueError("data.sizes is empty; give at least one [height, width]")
        seed, self._path = whole("data.seed", seed, 0), os.path.abspath(str(path))
        fraction("data.bad_budget", bad_budget, ends=True)
        files = listing(path, (*_IMAGES, ".tar"), "a folder of images or of WebDataset tars")
        self._index = kept(cache, ["images", str(files.root), files.state()], lambda: scan(files))
        self._index.check(bad_budget, self._path)
        super().__init__(self._index.split(fraction("data.held_out", held_out, ends=False)), seed)
        self._names = sorted({row["class"] for row in self._index.rows if isinstance(row["class"], str)})
        self.classes = self._count()
        found = sorted({self._size(row) for row in self._index.rows})
        self.traits = Traits(tuple((channels, 1, *size) for size in found), buckets=buckets, pack=pack)

    def _count(self) -> int:
        numbers = [row["class"] for row in self._index.rows if isinstance(row["class"], int)]
        if numbers and self._names:
            raise ValueError(f"data.path={self._path!r} has classes by number in tars and by name in folders")
        return max(numbers) + 1 if numbers else len(self._names)

    def item(self, index: int) -> Clip:
        """Raises ValueError or OSError, which name the file, if it has changed since it was listed."""
        row = self._index.rows[self._order.record(index)]
        mirrored = self._flip and self._part == "train"
        if mirrored:
            mirrored = bool(bits(1, Key(self._seed, Stream.PLACE, index))[0] & 1)
        pixels = decoded(Blob(**row["blob"]), self._size(row), self._channels)
        named = row["class"]
        label = self._names.index(named) if isinstance(named, str) else named
        return Clip(pixels[..., ::-1].copy() if mirrored else pixels, label)

    def shape(self, index: int) -> tuple[int, int, int, int]:
        row = self._index.rows[self._order.record(index)]
        return self._channels, 1, *self._size(row)

    def _size(self, row: dict[str, Any]) -> tuple[int, int]:
        wanted = math.log(row["height"] / row["width"])
        return min(self._sizes, key=lambda size: abs(math.log(size[0] / size[1]) - wanted))

    def describe(self) -> dict[str, Any]:
        return self._index.describe() | {
            "corpus": "images",
            "path": self._path,
            "part": self._part,
            "classes": self.classes,
            "sizes": [list(size) for size in self._sizes],
            "channels": self._channels,
            "flip": self._flip,
            "buckets": self.traits.buckets,
            "pack": self.traits.pack,
            "samples": len(self),
        }


def _size(size: Sequence[int], sizes: list[Sequence[int]]) -> tuple[int, int]:
    if len(size) != 2:
        raise ValueError(f"data.sizes={[list(s) for s in sizes]} must be pairs of height and width")
    return whole("data.sizes: the height", size[0], 1), whole("data.sizes: the width", size[1], 1)


def scan(files: Files) -> Index:
    """Every record, decoded once: only so is it known that it can be."""
    return Index.of(_records(files))


def _records(files: Files) -> Iterator[dict[str, Any] | Bad]:
    for name in files.names:
        if name.lower().endswith(".tar"):
            for location, members in groups(files, name):
                yield _tarred(location, members)
        else:
            folder, _, _ = name.partition("/") if "/" in name else ("", "", "")
            yield _record(files.blob(name), folder)


def _tarred(location: str, members: dict[str, Blob]) -> dict[str, Any] | Bad:
    images = [blob for extension, blob in members.items() if f".{extension}".endswith(_IMAGES)]
    if len(images) != 1:
        return Bad(location, f"{len(images)} images in the sample: {', '.join(members)}")
    try:
        label = label_of(members)
    except ValueError as error:
        return Bad(location, str(error))
    return _record(images[0], label)


def label_of(members: dict[str, Blob]) -> int:
    """The class of a WebDataset sample. ValueError if it has none."""
    try:
        if "cls" in members:
            label = int(members["cls"].read())
        elif "json" in members:
            label = json.loads(members["json"].read())["label"]
        else:
            raise ValueError("no .cls and no .json beside it")
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise ValueError(f"no class: {error}") from None
    if isinstance(label, bool) or not isinstance(label, int) or label < 0:
        raise ValueError(f"the class is {label!r}, not a whole number of at least 0")
    return label


def _record(blob: Blob, named: str | int) -> dict[str, Any] | Bad:
    try:
        content = blob.read()
        image = _image(content)
    except (OSError, ValueError, SyntaxError) as error:
        return Bad(blob.location, f"no image: {' '.join(str(error).split())}")
    digest = hashlib.sha256(content).hexdigest()
    return {
        "blob": {"location": blob.location, "path": blob.path, "start": blob.start, "size": blob.size},
        "class": named,
        "height": image.height,
        "width": image.width,
        "digest": digest,
    }


def _image(content: bytes) -> Any:
    """The first frame, decoded. Raises OSError, ValueError or SyntaxError for a damaged file."""
    from PIL import Image

    try:
        image = Image.open(io.BytesIO(content))
        image.load()
    except Image.DecompressionBombError as error:
        raise ValueError(str(error)) from None
    return image


def decoded(blob: Blob, size: tuple[int, int], channels: Literal[1, 3] | int) -> Floats:
    """float32 [channels, 1, height, width] in -1 .. 1, scaled to cover `size` and cut at the middle."""
    from PIL import Image

    try:
        image = _image(blob.read()).convert(_MODES[channels])
    except (OSError, ValueError, SyntaxError) as error:
        raise ValueError(f"{blob.path}: {blob.location} can no longer be read: {error}") from error
    height, width = size
    scale = max(height / image.height, width / image.width)
    # the part of the image that is kept, in its own pixels
    high, wide = height / scale, width / scale
    top, left = (image.height - high) / 2, (image.width - wide) / 2
    box = (left, top, left + wide, top + high)
    small = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    pixels = np.asarray(small, np.float32) / np.float32(127.5) - np.float32(1.0)
    return np.ascontiguousarray(pixels.reshape(height, width, channels).transpose(2, 0, 1)[:, None])
