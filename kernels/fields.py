"""What the fields of masks and spans may be: integers, below the limit of positions."""

from collections.abc import Iterable
from operator import index
from typing import Any

from torch import Tensor

UNLIMITED = 2**30  # positions are below this, so that sums of two of them fit int32


def integer(value: Any) -> int | None:
    """The value as a plain int, NumPy's and torch's among them; None of a bool and of all that is no integer,
    2.0 among it.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool):
        return None
    try:
        return index(value)
    except TypeError:
        return None


def require(mask: object, low: int, *names: str, high: int = UNLIMITED - 1, also: str = "") -> None:
    """Make plain ints of these fields; ValueError unless they are integers from `low` to `high`.

    also: what the error says may stand there too; the caller lets it through.
    """
    for name in names:
        value = getattr(mask, name)
        found = integer(value)
        if found is None or not low <= found <= high:
            raise ValueError(
                f"{type(mask).__name__}.{name} is {value}; it must be {also}an integer from {low} to {high}"
            )
        object.__setattr__(mask, name, found)


def at_least_one(where: str = "", **sizes: Any) -> None:
    """ValueError unless each is an integer of at least 1, naming the first that is not, after `where`."""
    for name, value in sizes.items():
        found = integer(value)
        if found is None or found < 1:
            kind = "an integer of at least 1" if found is None else "at least 1"
            raise ValueError(f"{where}{name} is {value!r}; it must be {kind}")


def integers(mask: object, name: str, low: int, high: int = UNLIMITED - 1) -> tuple[int, ...]:
    """The field as a tuple, whatever sequence it was given as; ValueError unless it holds such integers."""
    value = getattr(mask, name)
    given = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else (None,)
    found = tuple(x for x in map(integer, given) if x is not None and low <= x <= high)
    if not found or len(found) != len(given):
        raise ValueError(
            f"{type(mask).__name__}.{name} is {value}; it must be a list of integers from {low} to {high}"
        )
    object.__setattr__(mask, name, found)
    return found


def per_axis(mask: object, name: str, axes: int, low: int | None = None) -> None:
    """Make the field a tuple of one integer an axis, given so or as one for all; ValueError unless it holds
    such integers, of at least `low`.
    """
    value = getattr(mask, name)
    given = tuple(value) if isinstance(value, Iterable) else (value,) * axes
    found = tuple(x for x in map(integer, given) if x is not None and (low is None or x >= low))
    if len(given) != axes or len(found) != axes:
        kind = "an integer" if low is None else f"an integer of at least {low}"
        raise ValueError(
            f"{type(mask).__name__}.{name} is {given}; it must be {kind}, or one for each of {axes} axes"
        )
    object.__setattr__(mask, name, found)


def starts(mask: object, name: str, row: Any) -> tuple[int, ...]:
    """One row of the field as a tuple; ValueError unless it holds sorted integers, the first 0."""
    given = tuple(row) if isinstance(row, Iterable) else (row,)
    found = tuple(x for x in map(integer, given) if x is not None)
    ordered = all(a <= b for a, b in zip(found, found[1:], strict=False))
    if not given or len(found) != len(given) or found[0] != 0 or found[-1] > UNLIMITED or not ordered:
        raise ValueError(
            f"{type(mask).__name__}.{name} must be sorted starts from 0, got {given[:8]} (integers up to "
            f"{UNLIMITED})"
        )
    return found


def within(mask: object, limit: int, *least: Tensor) -> None:
    """Raise ValueError if any of these positions is `limit` or more."""
    beyond = [int(x.max()) for x in least if x.numel() and int(x.max()) >= limit]
    if beyond:
        raise ValueError(f"{mask} has {limit} positions, 0 to {limit - 1}, but is asked for {max(beyond)}")
