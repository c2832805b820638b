"""Latents from files, buckets of one shape, and rows of several clips."""

import struct
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

from clips import SMALL, every, latents, npy, write_images, write_safetensors, write_tar
from longspan.models.patch import patchify
from longspan.train.data.bucket import Buckets
from longspan.train.data.clip import Traits
from longspan.train.data.images import Images
from longspan.train.data.latents import Latents
from longspan.train.data.mock_latents import MockLatents
from longspan.train.data.tensorfile import TensorFile
from longspan.train.diffusion.batch import collate, grid_of, token_shape
from longspan.train.diffusion.pack import Rows


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


def test_latents_from_every_kind_of_file(tmp_path: Path) -> None:
    cache, x = tmp_path / "cache", latents(10, 4, 3, 6, 8)
    labels, words = np.arange(10) % 3, latents(10, 2, 5)
    half = (x.view(np.uint32) >> 16).astype(np.uint16)
    (tmp_path / "a").mkdir()
    write_safetensors(
        tmp_path / "a" / "a.safetensors",
        {"labels": ("I64", labels), "latents": ("F32", x), "text": ("F32", words)},
    )
    (tmp_path / "b").mkdir()
    np.savez(tmp_path / "b" / "b.npz", latents=x.astype(np.float64), labels=labels, text=words)
    (tmp_path / "c").mkdir()
    members: dict[str, bytes] = {}
    for i in range(10):
        members |= {f"{i}.npy": npy(x[i]), f"{i}.cls": b"%d" % labels[i], f"{i}.text.npy": npy(words[i])}
    write_tar(tmp_path / "c" / "c.tar", members)
    (tmp_path / "d").mkdir()
    write_safetensors(
        tmp_path / "d" / "d.safetensors", {"latents": ("BF16", half), "labels": ("I64", labels)}
    )
    for name, exact in (("a", x), ("b", x), ("c", x), ("d", (half.astype(np.uint32) << 16).view(np.float32))):
        data = Latents(path=tmp_path / name, cache=cache, shift=0.5, scale=2.0, held_out=0.2)
        assert data.classes == 3 and (len(data), len(data.held_out())) == (8, 2)
        known = {((row - np.float32(0.5)) * np.float32(2)).tobytes(): i for i, row in enumerate(exact)}
        seen = []
        for part in (data, data.held_out()):
            for i, clip in enumerate(every(part)):
                place = known[clip.pixels.tobytes()]
                seen.append(place)
                assert clip.label == labels[place] and clip.shape == part.shape(i) == (4, 3, 6, 8)
                assert (clip.text is None) == (name == "d")
                assert clip.text is None or np.array_equal(clip.text, words[place])
        assert sorted(seen) == list(range(10))
    clean = collate([data.item(0)], [0], patch=(1, 2, 2), null=3)
    assert clean.tokens.shape == (1, 3 * 3 * 4, 16) and clean.channels == 4 and clean.frames == 3


def test_bad_latents_are_counted_and_named(tmp_path: Path) -> None:
    (tmp_path / "l").mkdir()
    x = latents(20, 4, 6, 8)
    x[3, 0, 0, 0] = np.nan
    np.savez(tmp_path / "l" / "a.npz", latents=x, labels=np.where(np.arange(20) == 5, -1, 2))
    write_tar(
        tmp_path / "l" / "b.tar",
        {"0.npy": npy(latents(1, 4, 2, 2)[0]), "1.npy": npy(latents(1, 4)[0]), "2.npy": b"?", "3.cls": b"1"},
    )
    data = Latents(path=tmp_path / "l", cache=tmp_path / "c")
    reasons = {bad["location"]: bad["reason"] for bad in data.describe()["bad_records"]}
    assert set(reasons) == {"a.npz:3", "a.npz:5", "b.tar:1", "b.tar:2", "b.tar:3"}
    assert reasons["a.npz:3"] == "not all values are finite" and "class is -1" in reasons["a.npz:5"]
    assert {data.shape(i)[1:] for i in range(len(data))} == {(1, 6, 8), (1, 2, 2)} or len(
        data.held_out()
    ) == 1
    np.savez(tmp_path / "l" / "d.npz", latents=latents(3, 5, 6, 8))
    with pytest.raises(ValueError, match=r"differ in channels \(4, 5\)"):
        Latents(path=tmp_path / "l", cache=tmp_path / "c")


def test_damaged_tensor_files_are_named(tmp_path: Path) -> None:
    path = write_safetensors(tmp_path / "a.safetensors", {"latents": ("F32", latents(4, 1, 2, 2))})
    whole = path.read_bytes()
    file = TensorFile(path)
    assert file.names() == ["latents"] and "labels" not in file and file.shape("latents") == (4, 1, 2, 2)
    for content in (
        whole[:-1],
        whole[:20],
        b"",
        struct.pack("<Q", 2**60) + whole[8:],
        whole[:8] + b"?" + whole[9:],
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"a.safetensors cannot be read as safetensors"):
            Latents(path=path, cache=tmp_path / "c")
    (tmp_path / "b.npz").write_bytes(b"PK no zip")
    with pytest.raises(ValueError, match=r"b.npz cannot be read as npz"):
        Latents(path=tmp_path / "b.npz", cache=tmp_path / "c")
    np.savez(tmp_path / "b.npz", other=np.zeros(3))
    with pytest.raises(ValueError, match=r"has no array 'latents': it has other"):
        Latents(path=tmp_path / "b.npz", cache=tmp_path / "c")


def test_buckets_are_of_one_shape_and_within_the_budget(folder: Path, tmp_path: Path) -> None:
    data = Images(path=folder, cache=tmp_path / "cache", **SMALL)

    def tokens(shape: tuple[int, int, int, int]) -> int:
        return token_shape(shape, 4)[0]

    buckets = Buckets(data, tokens=tokens, budget=60)
    epochs = [[buckets.batch(e * len(buckets) + i) for i in range(len(buckets))] for e in range(2)]
    for epoch, batches in enumerate(epochs):
        assert sorted(sum(batches, [])) == list(range(epoch * len(data), (epoch + 1) * len(data)))
        for batch in batches:
            shapes = {data.shape(i) for i in batch}
            assert len(shapes) == 1 and sum(tokens(data.shape(i)) for i in batch) <= 60
            clean = collate([data.item(i) for i in batch], batch, patch=4, null=2)
            assert clean.tokens.shape == (len(batch), tokens(shapes.pop()), 48)
    assert Counter(len(b) for b in epochs[0])[3] > 0
    assert Buckets(data, tokens=tokens, budget=60).batch(1) == epochs[0][1]
    with pytest.raises(ValueError, match=r"data.buckets=10 holds no clip of shape \(3, 1, 16, 16\)"):
        Buckets(data, tokens=tokens, budget=10)
    mixed = [data.item(next(i for i in range(len(data)) if data.shape(i)[3] == w)) for w in (16, 24)]
    with pytest.raises(ValueError, match="one batch needs one shape"):
        collate(mixed, [0, 1], patch=4, null=2)


def test_rows_hold_every_clip_once(folder: Path, tmp_path: Path) -> None:
    data = Images(path=folder, cache=tmp_path / "cache", **SMALL)
    rows = Rows(data, patch=4, grid=(1, 4, 6), context=70)
    for epoch in range(2):
        places = range(epoch * len(rows), (epoch + 1) * len(rows))
        assert sorted(i for r in places for i in rows.items(r)) == list(
            range(epoch * len(data), (epoch + 1) * len(data))
        )
    clean = rows.load([0, 1])
    assert clean.offsets is not None and clean.indices == (0, 1)
    for r in range(2):
        for m, item in enumerate(rows.items(r)):
            clip = data.item(item)
            at = torch.nonzero(clean.members[r] == m).flatten()
            assert torch.equal(
                clean.tokens[r, at], patchify(torch.from_numpy(clip.pixels)[None], (1, 4, 4))[0]
            )
            starts = clean.offsets[r]
            assert isinstance(starts, tuple) and starts[m] == int(at[0])
            assert int(clean.labels[r, m]) == clip.label
            _, high, wide = grid_of(clip.shape, 4)
            assert clean.positions[r, at].tolist() == [6 * y + x for y in range(high) for x in range(wide)]
        padding = clean.members[r] < 0
        assert bool((clean.tokens[r, padding] == 0).all())
    with pytest.raises(ValueError, match="data.pack=20 holds no clip"):
        Rows(data, patch=4, grid=(1, 4, 6), context=20)
    with pytest.raises(ValueError, match=r"larger than the model's grid of \(1, 4, 5\)"):
        Rows(data, patch=4, grid=(1, 4, 5), context=70)


def test_made_up_latents_have_the_shape_that_is_asked_for() -> None:
    data = MockLatents(size=[3, 4, 6], channels=2, classes=5, text_dim=7, words=9, pooled_dim=3, seed=1)
    one, again = data.item(4), data.item(4)
    assert data.traits == Traits(((2, 3, 4, 6),), 7, 3) and one.shape == data.shape(4) == (2, 3, 4, 6)
    assert one.text is not None and one.text.shape == (9, 7)
    assert one.pooled is not None and one.pooled.shape == (3,)
    assert np.array_equal(one.pixels, again.pixels) and {data.item(i).label for i in range(60)} == set(
        range(5)
    )
    assert not np.array_equal(data.held_out().item(4).pixels, one.pixels) and one.pixels.dtype == np.float32
    image = MockLatents(size=[4, 6], classes=None)
    assert image.shape(0) == (4, 1, 4, 6) and image.classes == 1 and image.item(0).text is None
    for bad, words in (
        ({"size": [4]}, r"data.size is \[4\]"),
        ({"size": [4, 4], "words": 0}, "data.words=0"),
    ):
        with pytest.raises(ValueError, match=words):
            MockLatents(**bad)
