"""What is alive while something runs: a hook on every operator."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Live(TorchDispatchMode):
    """The most bytes that storages made by operators hold at a time: in all, and those of a dtype alone.

    which: the tensors that count, by what they are when they are made; None for all.
    """

    def __init__(self, which: Callable[[Tensor], bool] | None = None) -> None:
        super().__init__()
        self.which = which
        self.alive: dict[int, tuple[torch.dtype, int]] = {}
        self.most: Counter[torch.dtype | None] = Counter()
        self.counts: Counter[tuple[torch.dtype, int]] = Counter()  # the same of storages of one size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.untyped_storage()._cdata not in given:
                self._made(x)
        return result

    def _made(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key not in self.alive and storage.nbytes() and (self.which is None or self.which(x)):
            self.alive[key] = x.dtype, storage.nbytes()
            weakref.finalize(storage, self.alive.pop, key)
            now: Counter[torch.dtype | None] = Counter()
            for dtype, size in self.alive.values():
                now[dtype] += size
                now[None] += size
            self.most |= now
            self.counts |= Counter(self.alive.values())
