"""Data sets of images: what they give, what is held out, bad records."""

import io
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clips import SMALL, every, png, same, write_images, write_tar
from longspan.train.data.digits import Digits
from longspan.train.data.images import Images
from longspan.train.data.latents import Latents
from longspan.train.data.moving_digits import MovingDigits
from longspan.train.data.photos import Photos


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return write_images(tmp_path / "images")


@pytest.mark.parametrize("kind", [Digits, MovingDigits, Photos])
def test_items_are_functions_of_seed_and_index(kind: Any) -> None:
    settings = {"samples": 40} if kind is Photos else {}
    data, again, other = kind(**settings), kind(**settings), kind(seed=1, **settings)
    n = len(data)
    wanted = [3, n + 3, 5, 2 * n + 1]
    first = [data.item(i) for i in wanted]
    assert all(same(again.item(i), c) for i, c in reversed(list(zip(wanted, first, strict=True))))
    assert not all(same(other.item(i), c) for i, c in zip(wanted, first, strict=True))
    for part in (data, data.held_out()):
        clip = part.item(7)
        assert (
            clip.pixels.dtype == np.float32 and clip.shape == part.shape(7) and 0 <= clip.label < data.classes
        )
        assert clip.pixels.min() >= -1 and clip.pixels.max() <= 1
        assert json.loads(json.dumps(part.describe()))["samples"] == len(part)
    assert data.held_out().held_out().describe() == data.held_out().describe()
    with pytest.raises(IndexError, match="-1"):
        data.item(-1)


def test_digits_are_all_there_and_split_the_same_way_always() -> None:
    data, other = Digits(seed=0), Digits(seed=9)
    assert (len(data), len(data.held_out())) == (1438, 359)
    train, held = (Counter(c.pixels.tobytes() for c in every(part)) for part in (data, data.held_out()))
    assert train == Counter(c.pixels.tobytes() for c in every(other, epoch=3))
    assert not train.keys() & held.keys() and (train + held).total() == 1797
    assert all(same(a, b) for a, b in zip(every(data.held_out()), every(other.held_out()), strict=True))
    assert {c.label for c in every(data)} == set(range(10))
    # another share is another split
    assert len(Digits(held_out=0.5).held_out()) == 898


def test_moving_digits_slide_as_their_class_says() -> None:
    for settings in ({}, {"frames": 4, "height": 12, "width": 20, "speed": 3}):
        data = MovingDigits(**settings)
        images = {x.tobytes() for x in data.digits.arrays()[0]}
        starts = set()
        for i in range(60):
            clip = data.item(i)
            ink = clip.pixels[0] > -1
            step = data.speed if clip.label >= 10 else -data.speed
            for a, b in zip(clip.pixels[0], clip.pixels[0, 1:], strict=False):
                assert np.array_equal(np.roll(a, step, 1), b)
            rows, columns = np.flatnonzero(ink.any((0, 2))), np.flatnonzero(ink[0].any(0))
            starts.add((int(rows[0]), int(columns[0])))
            boxes = [
                clip.pixels[0, 0, y : y + 8, x : x + 8]
                for y in range(data.height - 7)
                for x in range(data.width - 7)
            ]
            assert any(box.tobytes() in images for box in boxes)
        assert len(starts) > 20 or not settings
    labels = Counter(c.label for c in every(MovingDigits().held_out()))
    assert set(labels) == set(range(20)) and all(labels[d] == labels[d + 10] for d in range(10))
    with pytest.raises(ValueError, match="data.width=15 is too narrow: 5 frames at 2 pixels a frame need 16"):
        MovingDigits(width=15)


def test_photos_are_crops_that_training_and_held_out_do_not_share() -> None:
    data = Photos(size=(24, 40), shrink=4, samples=200)
    train = [c.pixels for c in every(data)]
    assert train[0].shape == (3, 1, 24, 40) and {c.label for c in every(data)} == {0, 1}
    whole = np.concatenate([data._strips["train"], data._strips["held_out"]], 2)
    assert whole.shape == (2, 106, 160, 3) and data._strips["held_out"].shape[2] == 40
    for clip in every(data.held_out())[:20]:
        # the whole width of the held-out strip
        assert np.isin(clip.pixels[:, 0].transpose(1, 2, 0), whole[clip.label, :, 120:]).all()
    assert len({x.tobytes() for x in train}) > 190
    for settings, told in (
        ({"size": (64, 700)}, "does not fit"),
        ({"shrink": 500}, "leaves nothing"),
        ({"size": (64,)}, "height and width"),
    ):
        with pytest.raises(ValueError, match=told):
            Photos(**settings)


def test_without_scikit_learn_one_line_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [m for m in sys.modules if m.partition(".")[0] == "sklearn"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sklearn", None)
    for kind in (Digits, MovingDigits, Photos):
        with pytest.raises(ModuleNotFoundError, match=r"needs scikit-learn: pip install longspan\[images\]"):
            kind()


def test_a_folder_of_images(folder: Path, tmp_path: Path) -> None:
    data = Images(path=folder, cache=tmp_path / "cache", **SMALL)
    assert data.classes == 2 and len(data) + len(data.held_out()) == 24
    for part in (data, data.held_out()):
        for i, clip in enumerate(every(part)):
            assert clip.shape == part.shape(i) and clip.pixels.dtype == np.float32
            assert clip.shape[2:] in {(16, 24), (16, 16)}
    assert Counter(c.label for p in (data, data.held_out()) for c in every(p)) == {0: 16, 1: 8}
    # 20 x 30 is scaled by 0.8 without a cut, 30 x 30 by 16 / 30
    assert Counter(data.shape(i)[2:] for i in range(len(data)))[16, 16] > 0
    grey = Images(path=folder, cache=tmp_path / "cache", **SMALL | {"channels": 1})
    assert grey.item(0).shape[0] == 1
    flipped = Images(path=folder, cache=tmp_path / "cache", **SMALL | {"flip": True})
    turned = [
        (same(a, b), np.array_equal(a.pixels[..., ::-1], b.pixels))
        for a, b in zip(every(data), every(flipped), strict=True)
    ]
    assert all(a != b for a, b in turned) and 0 < sum(a for a, _ in turned) < len(turned)
    assert all(same(a, b) for a, b in zip(every(data.held_out()), every(flipped.held_out()), strict=True))


def test_an_image_is_cut_at_the_middle(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    for i, level in enumerate((0, 255)):
        page = np.full((10, 40, 3), level, np.uint8)
        page[:, :15], page[:, 25:] = 90, 90
        Image.fromarray(page).save(tmp_path / "i" / f"{i}.png")
    data = Images(path=tmp_path / "i", sizes=[[5, 5]], held_out=0.5, cache=tmp_path / "c", flip=False)
    found = sorted(float(p.item(0).pixels[:, :, :, 1:4].mean()) for p in (data, data.held_out()))
    assert found == pytest.approx([-1, 1], abs=0.02) and data.classes == 1


def test_a_webdataset_is_read_by_key(tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for i in range(12):
        members[f"{i:03}.png"] = png(16, 16, i)
        members |= (
            {f"{i:03}.cls": f"{i % 4}\n".encode()} if i % 2 else {f"{i:03}.json": b'{"label": %d}' % (i % 4)}
        )
    write_tar(tmp_path / "a.tar", members)
    data = Images(path=tmp_path, sizes=[[16, 16]], cache=tmp_path / "cache", held_out=0.2, flip=False)
    assert data.classes == 4 and len(data) + len(data.held_out()) == 12
    wanted = {}
    for i in range(12):
        levels = np.asarray(Image.open(io.BytesIO(members[f"{i:03}.png"])), np.float32)
        wanted[i % 4, (levels / np.float32(127.5) - 1).transpose(2, 0, 1).tobytes()] = i
    found = [wanted[c.label, c.pixels.tobytes()] for p in (data, data.held_out()) for c in every(p)]
    assert sorted(found) == list(range(12))


def test_bad_images_are_counted_named_and_limited(folder: Path, tmp_path: Path) -> None:
    (folder / "cat" / "broken.png").write_bytes(png(16, 16, 99)[:-60])
    (folder / "cat" / "text.jpg").write_text("no image")
    write_tar(folder / "b.tar", {"x.png": png(16, 16, 98), "y.cls": b"1"})
    cache = tmp_path / "cache"
    said = Images(path=folder, cache=cache, **SMALL).describe()
    assert (said["records"], said["bad"]) == (28, 4)
    named = {bad["location"]: bad["reason"] for bad in said["bad_records"]}
    assert set(named) == {"cat/broken.png", "cat/text.jpg", "b.tar:x", "b.tar:y"}
    assert "no class" in named["b.tar:x"] and "0 images" in named["b.tar:y"]
    with pytest.raises(ValueError, match=r"data.bad_budget=0: 4 of 28 .*\n  b.tar:x: no class") as caught:
        Images(path=folder, cache=cache, **SMALL | {"bad_budget": 0})
    assert "cat/text.jpg: no image" in str(caught.value)
    for i in range(12):
        (folder / "dog" / f"bad{i}.png").write_bytes(b"")
    with pytest.raises(ValueError, match="data.bad_budget=0.01: 16 of 40"):
        Images(path=folder, cache=cache, **SMALL)
    assert Images(path=folder, cache=cache, **SMALL | {"bad_budget": 0.5}).describe()["bad"] == 16


def test_the_list_is_kept_and_made_anew_when_files_change(folder: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    one = Images(path=folder, cache=cache, **SMALL)
    kept = list(cache.iterdir())
    assert len(kept) == 1
    changed = kept[0].stat().st_mtime_ns
    assert Images(path=folder, cache=cache, **SMALL).describe() == one.describe()
    assert list(cache.iterdir()) == kept and kept[0].stat().st_mtime_ns == changed
    kept[0].write_text(kept[0].read_text().replace('"height": 20', '"height": 21'))
    assert Images(path=folder, cache=cache, **SMALL).describe() == one.describe()
    (folder / "cat" / "new.png").write_bytes(png(20, 20, 77))
    assert Images(path=folder, cache=cache, **SMALL).describe()["records"] == 25
    (folder / "cat" / "01.png").write_bytes(b"gone")
    with pytest.raises(ValueError, match=r"cat/01.png can no longer be read"):
        every(one), every(one.held_out())
    with pytest.raises(OSError, match=r"data.cache=.* cannot be used"):
        Images(path=folder, cache=folder / "cat" / "02.png", **SMALL)


def test_copies_of_an_image_fall_on_one_side(tmp_path: Path) -> None:
    (tmp_path / "i").mkdir()
    for i in range(30):
        (tmp_path / "i" / f"{i}.png").write_bytes(png(8, 8, i % 6))
    data = Images(path=tmp_path / "i", sizes=[[8, 8]], cache=tmp_path / "c", held_out=0.3, flip=False)
    sides = [{c.pixels.tobytes() for c in every(part)} for part in (data, data.held_out())]
    assert sides[0] and sides[1] and not sides[0] & sides[1]


@pytest.mark.parametrize("cut", [700, 1500])
def test_a_damaged_archive_is_an_error(tmp_path: Path, cut: int) -> None:
    path = write_tar(tmp_path / "a.tar", {f"{i}.png": png(16, 16, i) for i in range(3)})
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(ValueError, match=r"a.tar cannot be read beyond .*must be whole and not compressed"):
        Images(path=tmp_path, cache=tmp_path / "c")
    path.write_bytes(b"\x1f\x8b no tar")
    with pytest.raises(ValueError, match=r"a.tar cannot be read beyond its start"):
        Images(path=tmp_path, cache=tmp_path / "c")


def test_paths_that_hold_nothing_are_told(tmp_path: Path) -> None:
    for kind in (Images, Latents):
        with pytest.raises(FileNotFoundError, match=r"data.path=.*none' does not exist: give"):
            kind(path=tmp_path / "none", cache=tmp_path / "c")
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(ValueError, match=r"data.path=.*empty' has no"):
            kind(path=tmp_path / "empty", cache=tmp_path / "c")
    for settings, told in (
        ({"channels": 2}, "channels=2"),
        ({"sizes": []}, "sizes is empty"),
        ({"sizes": [[8]]}, "pairs"),
    ):
        with pytest.raises(ValueError, match=told):
            Images(path=tmp_path, cache=tmp_path / "c", **settings)
    with pytest.raises(ValueError, match="data.scale=0"):
        Latents(path=tmp_path, cache=tmp_path / "c", scale=0)
