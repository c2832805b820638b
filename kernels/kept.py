"""Results kept by the bytes that they hold, where a count of them says nothing about memory."""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from functools import update_wrapper
from threading import Lock
from typing import Any, Generic, ParamSpec, TypeVar

from torch import Tensor

P = ParamSpec("P")
R = TypeVar("R")


class Kept(Generic[P, R]):
    """A function whose results are kept for equal arguments, those used last and up to `limit` bytes of
    tensors in them; the `least` used last stay however large they are, since the next step needs the same.
    Thread-safe: a backward runs in threads of autograd's own.
    """

    __wrapped__: Callable[P, R]
    __name__: str
    most = 256  # results, for the arguments take memory too

    def __init__(self, make: Callable[P, R], limit: int, least: int) -> None:
        self.make, self.limit, self.least = make, limit, least
        self.found: OrderedDict[Hashable, tuple[R, int]] = OrderedDict()
        self.held = 0
        self.lock = Lock()
        update_wrapper(self, make)

    def __call__(self, *args: P.args, **kinds: P.kwargs) -> R:
        key = (args, tuple(sorted(kinds.items())))
        with self.lock:
            if key in self.found:
                self.found.move_to_end(key)
                return self.found[key][0]
        made = self.make(*args, **kinds)
        with self.lock:
            if key not in self.found:
                self._keep(key, made)
            # of two threads that made the same, one's is kept
            return self.found[key][0]

    def _keep(self, key: Hashable, made: R) -> None:
        self.found[key] = made, size(made)
        self.held += self.found[key][1]
        while len(self.found) > (self.least if self.held > self.limit else self.most):
            self.held -= self.found.popitem(last=False)[1][1]


def kept(limit: int = 2**28, *, least: int = 8) -> Callable[[Callable[P, R]], Kept[P, R]]:
    """The decorator of `Kept`: 256 MiB by default."""
    return lambda make: Kept(make, limit, least)


def size(value: Any) -> int:
    """Bytes of memory behind the tensors in nested tuples, shared memory once."""
    return sum(_storages(value, {}).values())


def _storages(value: Any, found: dict[int, int]) -> dict[int, int]:
    if isinstance(value, Tensor):
        storage = value.untyped_storage()
        found[storage.data_ptr()] = storage.nbytes()
    elif isinstance(value, tuple):
        for part in value:
            _storages(part, found)
    return found
