"""How near samples are to real data: Frechet distance on features of choice, and distance to the nearest."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
Doubles = npt.NDArray[np.float64]
# Clips [n, C, F, H, W] -> features [n, d].
Features = Callable[[Array], Array]


def pixels(clips: Array) -> Doubles:
    """Every pixel is a feature: [n, ...] -> float64 [n, d]."""
    return clips.reshape(len(clips), -1).astype(np.float64)


@dataclass(frozen=True)
class Squares:
    """Features of clips of any size: the mean of each frame's pixels over `side` x `side` equal squares."""

    side: int = 8

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"features: side is {self.side}; it must be at least 1")

    def __call__(self, clips: Array) -> Doubles:
        """[n, C, F, H, W] -> float64 [n, C F side side]; ValueError if a clip is smaller."""
        high, wide = clips.shape[3:]
        if min(high, wide) < self.side:
            raise ValueError(f"features: side is {self.side}, but the clips have {high} x {wide} pixels")
        rows, columns = ([n * i // self.side for i in range(self.side)] for n in (high, wide))
        sums = np.add.reduceat(np.add.reduceat(clips.astype(np.float64), rows, 3), columns, 4)
        counts = np.outer(np.diff([*rows, high]), np.diff([*columns, wide]))
        return pixels(sums / counts)


@dataclass(frozen=True)
class Gaussian:
    """Mean float64 [d] and covariance [d, d] of features."""

    mean: Doubles
    covariance: Doubles

    @classmethod
    def of(cls, features: Array) -> "Gaussian":
        """Fitted to features [n, d]. ValueError if there are not two samples or one is not finite."""
        exact = features.astype(np.float64)
        if exact.ndim != 2 or len(exact) < 2:
            raise ValueError(f"features are {exact.shape}; a covariance needs [n, d] with n of at least 2")
        if not np.isfinite(exact).all():
            raise ValueError("features are not all finite, so they have no Frechet distance")
        return cls(exact.mean(0), np.atleast_2d(np.cov(exact, rowvar=False)))


def frechet(a: Gaussian, b: Gaussian) -> float:
    """|mean a - mean b|^2 + trace(A + B - 2 (A B)^(1/2)) (Dowson and Landau 1982).

    The root's trace is the sum of the roots of the eigenvalues of A^(1/2) B A^(1/2), which are real and found
    in float64 also where a covariance is singular; a general matrix root is neither. Of samples it falls with
    their number: compare at one, and with that of as many held-out clips.
    """
    values, vectors = np.linalg.eigh(a.covariance)
    root = (vectors * np.sqrt(values.clip(min=0.0))) @ vectors.T
    product = root @ b.covariance @ root
    shared = np.sqrt(np.linalg.eigvalsh((product + product.T) / 2.0).clip(min=0.0)).sum()
    apart = float(((a.mean - b.mean) ** 2).sum())
    return apart + float(np.trace(a.covariance) + np.trace(b.covariance) - 2.0 * shared)


def nearest(samples: Array, real: Array, chunk: int = 256) -> tuple[Doubles, npt.NDArray[np.int64]]:
    """Euclidean distance of each sample to the nearest real clip, float64 [n], and which it is, int64 [n].

    A mean far below the one of held-out images says that the model learned images by heart.
    """
    there = pixels(real)
    squares = (there**2).sum(1)
    distances, which = [], []
    for at in range(0, len(samples), chunk):
        here = pixels(samples[at : at + chunk])
        squared = (here**2).sum(1)[:, None] + squares - 2.0 * here @ there.T
        found = squared.argmin(1)
        which.append(found)
        # the expanded square is rounded where two are nearly equal
        distances.append(np.sqrt(((here - there[found]) ** 2).sum(1)))
    return np.concatenate(distances), np.concatenate(which)
