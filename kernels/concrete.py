"""Plans are made of numbers, also while tensors have none."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

from torch._subclasses.fake_tensor import unset_fake_temporarily

P = ParamSpec("P")
R = TypeVar("R")


def concrete(plan: Callable[P, R]) -> Callable[P, R]:
    """The function, whose own tensors have values even in a dry run, which gives all others shapes only.

    For what decides from masks and placements, never from activations.
    """

    @wraps(plan)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        with unset_fake_temporarily():
            return plan(*args, **kwargs)

    return call
