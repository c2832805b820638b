"""Metrics of samples against closed forms and real data, and their pictures."""

from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageSequence

from longspan.train.data.digits import Digits
from longspan.train.data.moving_digits import MovingDigits
from longspan.train.diffusion.classify import DigitClassifier, motion
from longspan.train.diffusion.grids import GUTTER, by_class, save_gif, save_mp4, save_png, tiled
from longspan.train.diffusion.metrics import Features, Gaussian, Squares, frechet, nearest, pixels
from longspan.train.diffusion.ruler import Ruler, Sampled

Array = npt.NDArray[Any]


@lru_cache
def digits() -> Digits:
    return Digits()


def frechet_distance(samples: Array, real: Array, features: Features = pixels) -> float:
    return frechet(Gaussian.of(features(samples)), Gaussian.of(features(real)))


@lru_cache
def classifier() -> DigitClassifier:
    return DigitClassifier(digits())


def test_frechet_of_gaussians_is_the_closed_form() -> None:
    rng = np.random.default_rng(0)
    # covariances that commute have the root of their product entry by entry
    basis = np.linalg.qr(rng.standard_normal((6, 6)))[0]
    a, b, shift = rng.uniform(0.1, 4, 6), rng.uniform(0.1, 4, 6), rng.standard_normal(6)
    one = Gaussian(np.zeros(6), basis * a @ basis.T)
    two = Gaussian(shift, basis * b @ basis.T)
    want = float((shift**2).sum() + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum())
    assert frechet(one, two) == pytest.approx(want, rel=1e-12) == frechet(two, one)
    assert frechet(one, one) == pytest.approx(0, abs=1e-12)


def test_frechet_of_any_covariances_is_that_of_the_matrix_root() -> None:
    rng = np.random.default_rng(1)
    factors = rng.standard_normal((2, 5, 5))
    a, b = (x @ x.T for x in factors)
    # the trace of the root of a product, by its own eigenvalues, which are those of no symmetric matrix
    want = np.trace(a) + np.trace(b) - 2 * np.sqrt(np.linalg.eigvals(a @ b).real).sum()
    zero = np.zeros(5)
    assert frechet(Gaussian(zero, a), Gaussian(zero, b)) == pytest.approx(float(want), rel=1e-9)
    # singular: a plane against a line across it
    plane, line = np.diag([1.0, 4.0, 0.0]), np.diag([0.0, 0.0, 9.0])
    assert frechet(Gaussian(zero[:3], plane), Gaussian(zero[:3], line)) == pytest.approx(14.0, rel=1e-12)


def test_frechet_takes_the_features_it_is_given() -> None:
    rng = np.random.default_rng(2)
    a, b = rng.standard_normal((2, 400, 1, 1, 2, 2)).astype(np.float32)
    mean = lambda clips: clips.mean((1, 2, 3, 4), keepdims=True).reshape(-1, 1)  # noqa: E731
    want = (mean(a).mean() - mean(b).mean()) ** 2 + (mean(a).std(ddof=1) - mean(b).std(ddof=1)) ** 2
    assert frechet_distance(a, b, mean) == pytest.approx(float(want), rel=1e-4)
    assert pixels(a).shape == (400, 4) and pixels(a).dtype == np.float64
    with pytest.raises(ValueError, match="not all finite"):
        frechet_distance(np.full_like(a, np.nan), b)
    with pytest.raises(ValueError, match="n of at least 2"):
        Gaussian.of(np.zeros((1, 3)))


def test_squares_are_means_of_parts_of_any_size() -> None:
    clips = np.random.default_rng(3).standard_normal((2, 3, 2, 5, 8))
    found = Squares(side=2)(clips).reshape(2, 3, 2, 2, 2)
    assert np.allclose(found[..., 0, 1], clips[..., :2, 4:].mean((3, 4)))
    assert np.allclose(found[..., 1, 0], clips[..., 2:, :4].mean((3, 4)))
    for side, said in ((0, "side is 0"), (6, "side is 6, but the clips have 5 x 8 pixels")):
        with pytest.raises(ValueError, match=said):
            Squares(side=side)(clips)


def test_samples_are_measured_beside_the_floor() -> None:
    held, labels = digits().held_out().arrays()
    found = Sampled(1.0, held[:100], tuple(labels[:100].tolist()))
    for features in (pixels, Squares(side=4)):
        ruler = Ruler(digits(), "pixels" if features is pixels else features)
        values = ruler.measure(found)
        # held-out images are as far from the training images as held-out images are
        assert values["frechet"] == values["frechet_floor"]
        assert values["frechet"] == pytest.approx(
            frechet_distance(held[:100], digits().arrays()[0], features)
        )
        assert values["accuracy"] > 0.95 and 1.9 < values["nearest"] < 2.3
        real = ruler.real(100)
        assert real == {name: value for name, value in values.items() if name != "frechet_floor"}
    # samples of another size have features, but no neighbours and no classifier
    large = Sampled(1.0, held[:9].repeat(2, 3).repeat(2, 4), (0,) * 9)
    assert Ruler(digits()).measure(large) == {"count": 9}
    assert set(ruler.measure(large)) == {"frechet", "frechet_floor", "count"}


def test_real_digits_have_the_known_floor_and_distance() -> None:
    real, labels = digits().arrays()
    held, held_labels = digits().held_out().arrays()
    floor = frechet_distance(held, real)
    assert 0.3 < floor < 0.5
    distances, which = nearest(held, real)
    assert 2.0 < distances.mean() < 2.2
    assert (labels[which] == held_labels).mean() > 0.97
    # what was learned by heart, and what is noise, are told apart from real images
    assert nearest(real[:50], real)[0].max() == 0
    noise = np.random.default_rng(0).uniform(-1, 1, held.shape)
    assert frechet_distance(noise, real) > 20 * floor and nearest(noise, real)[0].mean() > 3
    one = np.sqrt(((held[:7, None] - real[None]) ** 2).sum((2, 3, 4, 5))).min(1)
    assert np.allclose(nearest(held[:7], real, chunk=3)[0], one, atol=1e-5)


def test_the_classifier_is_right_on_real_images_it_never_saw() -> None:
    held, labels = digits().held_out().arrays()
    assert classifier().accuracy(held, labels) >= 0.989
    assert classifier().accuracy(held, (labels + 1) % 10) < 0.02
    assert classifier()(np.full((2, 8, 8), np.nan)).tolist() == [-1, -1]


@pytest.mark.parametrize("canvas", [(5, 8, 16), (6, 11, 24)])
def test_motion_is_seen_in_real_clips_and_missed_in_wrong_ones(canvas: tuple[int, int, int]) -> None:
    frames, height, width = canvas
    data = MovingDigits(frames=frames, height=height, width=width).held_out()
    items = [data.item(i) for i in range(120)]
    clips, labels = np.stack([c.pixels for c in items]), np.array([c.label for c in items])
    seen = motion(clips, labels, classifier())
    # where a canvas leaves room, a track may be a pixel beside its digit
    assert seen.digit == seen.both > (0.97 if width == 16 else 0.95)
    assert seen.direction == 1 and seen.jitter == 0
    # played backwards, the digit is right and the direction wrong
    back = motion(clips[:, :, ::-1], labels, classifier())
    assert back.digit == seen.digit and back.direction == 0 and back.both == 0
    other = motion(clips, (labels + 1) % 10 + labels // 10 * 10, classifier())
    assert other.digit < 0.02 and other.direction == 1
    blurred = clips + np.random.default_rng(0).normal(0, 0.2, clips.shape)
    assert 0.1 < motion(blurred, labels, classifier()).jitter < 0.5


def test_a_grid_has_gutters_and_every_pixel() -> None:
    clips = np.linspace(-1, 1, 5 * 4 * 6).reshape(5, 1, 1, 4, 6)
    page = tiled(clips, columns=3, scale=3, gutter=2)
    assert page.shape == (1, 2 * (12 + 2) + 2, 3 * (18 + 2) + 2, 3) and page.dtype == np.uint8
    for i in range(5):
        top, left = 2 + i // 3 * 14, 2 + i % 3 * 20
        tile = page[0, top : top + 12 : 3, left : left + 18 : 3, 0]
        assert np.abs(tile - (clips[i, 0, 0] + 1) * 127.5).max() <= 0.5
        assert np.array_equal(page[0, top + 2, left : left + 18], page[0, top, left : left + 18])
    for gap in (page[0, :2], page[0, 14:16], page[0, :, 20:22], page[0, 16:, 42:]):
        assert (gap == GUTTER).all()
    assert tiled(clips, columns=9).shape[1:3] == (4 + 64 + 4, 4 + 5 * (6 * 16 + 4))
    odd = np.stack([np.full((1, 1, 2, 2), np.nan), np.full((1, 1, 2, 2), 7.0)])
    assert tiled(odd, columns=2, scale=1, gutter=0)[0, 0, :, 0].tolist() == [0, 0, 255, 255]
    assert by_class([2, 0, 2, 1]) == [1, 3, 0, 2]
    for wrong in ({"columns": 0}, {"columns": 1, "scale": -1}):
        with pytest.raises(ValueError, match="columns is"):
            tiled(clips, **wrong)
    with pytest.raises(ValueError, match="a grid needs"):
        tiled(clips[:0], columns=1)


def test_pictures_are_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    clips = rng.uniform(-1, 1, (6, 3, 4, 8, 8))
    clips[:, :, 2] = clips[:, :, 1]
    with Image.open(save_png(clips[:, :, :1], tmp_path / "a.png", columns=3, scale=2)) as image:
        assert image.size == (3 * 20 + 4, 2 * 20 + 4)
        assert np.array_equal(np.asarray(image), tiled(clips[:, :, :1], columns=3, scale=2)[0])
    with Image.open(save_png(clips, tmp_path / "b.png", columns=2, scale=1, gutter=1)) as image:
        assert image.size == (2 * (4 * 9 - 1 + 1) + 1, 3 * 9 + 1)
    with Image.open(save_gif(clips, tmp_path / "c.gif", columns=3, frame_s=0.25)) as image:
        # two equal frames are one that stands twice as long
        frames = [frame.info["duration"] for frame in ImageSequence.all_frames(image)]
        assert frames == [250, 500, 250] and image.info["loop"] == 0
        assert image.size == tiled(clips, columns=3).shape[2:0:-1]
    av = pytest.importorskip("av")
    grey = clips[:, :1]
    with av.open(save_mp4(grey, tmp_path / "c.mp4", columns=3, frame_s=0.25)) as film:
        shown = [frame.to_ndarray(format="rgb24").astype(int) for frame in film.decode(video=0)]
        assert film.streams.video[0].average_rate == 4 and len(shown) == 4
    pages = tiled(grey, columns=3).astype(int)
    for frame, page in zip(shown, pages, strict=True):
        assert np.abs(frame[: page.shape[0], : page.shape[1]] - page).mean() < 6
    with pytest.raises(ValueError, match="frame_s is 0.0;"):
        save_mp4(clips, tmp_path / "d.mp4", columns=1, frame_s=0.0)
    with pytest.raises(ValueError, match="frame_s is 0.001"):
        save_gif(clips, tmp_path / "d.gif", columns=1, frame_s=0.001)
