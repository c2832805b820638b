"""The gradients' norm in ZeRO's step, seen before any weight changes."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from .protocol import May


@contextmanager
def asked(zero: Any, stage: int, may: May) -> Iterator[list[float]]:
    """Within, a step of `zero`, DeepSpeed's optimizer, is made only if `may` allows its norm, which is in the
    list then.

    DeepSpeed drops a step, with its gradients, if their norm is not finite: it is told that one is infinite
    which is not allowed.
    """
    name = "_get_norm_groups" if stage == 3 else "scaled_global_norm"
    norm_of = getattr(zero, name)
    norms: list[float] = []

    def telling(*args: Any, **kwargs: Any) -> Any:
        found = norm_of(*args, **kwargs)
        norms.append(whole(found if stage == 3 else [found]))
        if may(norms[-1]):
            return found
        never = torch.tensor(math.inf)
        return [never] if stage == 3 else never

    setattr(zero, name, telling)
    try:
        yield norms
    finally:
        # the method of its class is seen again
        delattr(zero, name)


def whole(norms: Sequence[Any]) -> float:
    """The norm of the norms of groups, in which DeepSpeed says -1 for what is not finite."""
    found = [float(norm) for norm in norms]
    return math.hypot(*found) if all(norm >= 0 for norm in found) else math.inf
