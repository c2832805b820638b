"""Who holds how many bytes while a step runs, and what it sends: counted at each operator, also of tensors
without data.
"""

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# The category of activations that are not on the device.
HOST = "offloaded activations"
# What each collective is called, and the argument that says what this rank puts in.
SENT = {
    "c10d::allreduce_": ("all-reduce", 0),
    "c10d::broadcast_": ("broadcast", 0),
    "c10d::send": ("send", 0),
    "c10d::alltoall_base_": ("all-to-all", 1),
    "c10d::alltoall_": ("all-to-all", 1),
    "c10d::_allgather_base_": ("all-gather", 1),
    "c10d::allgather_": ("all-gather", 1),
    "c10d::_reduce_scatter_base_": ("reduce-scatter", 1),
    "c10d::reduce_scatter_": ("reduce-scatter", 1),
}
# How many times over, times n - 1 ranks, what is put in leaves a rank of n when it goes around a ring.
LEAVES: dict[str, Callable[[int], float]] = {
    "all-reduce": lambda n: 2 / n,
    "broadcast": lambda n: 1 / (n - 1),
    "send": lambda n: 1 / (n - 1),
    "all-to-all": lambda n: 1 / n,
    "all-gather": lambda n: 1,
    "reduce-scatter": lambda n: 1 / n,
}


@dataclass(frozen=True)
class Moved:
    """Bytes that left this rank in calls of one kind over groups of one size, as they do when collectives go
    around in rings. link: `node` if all that it went to are on this rank's machine, else `network`.
    """

    kind: str
    ranks: int
    link: str
    bytes: int
    calls: int


@dataclass
class _Held:
    bytes: int
    category: str
    ref: Any = field(repr=False, default=None)


class Ledger(TorchDispatchMode):
    """Counts the bytes of storages that operators make under it, by category, until they are freed.

    wide: the width by which logits are known, so that they are told from other activations; 0 knows none.
    node: ranks of a machine.
    Counts what goes through torch's dispatcher: neither workspaces inside an operator nor what a
    communication library holds. away: categories that rest in host memory. peak: by category when the
    device held most; most: their sum; resting: by category when host memory held most; host: their sum.
    """

    def __init__(self, wide: int = 0, node: int = 8) -> None:
        super().__init__()
        self.wide, self.node = wide, node
        self.away = {HOST}
        self.now: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.resting: Counter[str] = Counter()
        self.most = 0
        self.host = 0
        self.phase = "activations"
        self._sent: Counter[tuple[str, int, str]] = Counter()
        self._calls: Counter[tuple[str, int, str]] = Counter()
        self._held: dict[int, _Held] = {}
        self._stack = ExitStack()

    def __enter__(self) -> "Ledger":
        # sharded weights are freed and made again by resizing, which is no operator
        plain = torch.UntypedStorage.resize_
        ledger = self

        def resize(storage: torch.UntypedStorage, size: int) -> Any:
            result = plain(storage, size)
            ledger._resized(storage)
            return result

        self._stack.enter_context(patch.object(torch.UntypedStorage, "resize_", resize))
        super().__enter__()
        return self

    def __exit__(self, *given: Any) -> None:
        super().__exit__(*given)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split(".")[0]
        if name in SENT:
            self._move(*SENT[name], args)
        if func is torch.ops.aten._local_scalar_dense.default and isinstance(args[0], FakeTensor):
            # a number that is not there: what asks for one, such as a gradient norm, goes on with 1
            return _one(args[0].dtype)
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor):
                self.see(x, self._category(x))
        if name.startswith("c10d::"):
            for x in tree_leaves((args, kwargs)):
                if isinstance(x, Tensor):
                    self.name([x], "communication", only=("activations", "gradients in flight"))
        return result

    def see(self, x: Tensor, category: str) -> None:
        """Counts the storage of a tensor, unless it is counted already; of a DTensor that of its shard."""
        storage = _storage(x)
        key = storage._cdata
        if key in self._held or not storage.nbytes():
            return
        held = _Held(storage.nbytes(), category)
        held.ref = weakref.ref(storage, lambda _: self._freed(key))
        self._held[key] = held
        self._add(category, held.bytes)

    def name(self, tensors: Iterable[Tensor], category: str, *, only: tuple[str, ...] = ()) -> None:
        """Says what these tensors are, counting those that were made before; `only` what was one of these."""
        for x in tensors:
            self.see(x, category)
            held = self._held.get(_storage(x)._cdata)
            if held is not None and held.category != category and (not only or held.category in only):
                self._add(held.category, -held.bytes)
                held.category = category
                self._add(category, held.bytes)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """What is made meanwhile has this category."""
        before, self.phase = self.phase, phase
        try:
            yield
        finally:
            self.phase = before

    def moved(self) -> list[Moved]:
        """What was sent so far."""
        return [Moved(*key, size, self._calls[key]) for key, size in sorted(self._sent.items())]

    def total(self) -> int:
        """Bytes on the device."""
        return sum(n for name, n in self.now.items() if name not in self.away)

    def restart(self) -> None:
        """Forgets the peak and what was sent; what is held stays."""
        self.most = self.host = -1
        self._note()
        self._sent.clear()
        self._calls.clear()

    def _category(self, x: Tensor) -> str:
        if self.wide and x.ndim >= 2 and x.shape[-1] == self.wide and self.phase == "activations":
            return "logits"
        return self.phase

    def _move(self, kind: str, place: int, args: Any) -> None:
        given = next((a for a in args if _is_group(a)), None)
        group = dist.ProcessGroup.unbox(given) if given is not None else dist.group.WORLD
        members = dist.get_process_group_ranks(group)
        n = len(members)
        if n == 1:
            return
        # a send names whom it goes to, by its place in the group
        reached = [members[args[2]], dist.get_rank()] if kind == "send" else members
        key = kind, n, "node" if len({r // self.node for r in reached}) == 1 else "network"
        size = sum(x.numel() * x.element_size() for x in tree_leaves(args[place]) if isinstance(x, Tensor))
        self._sent[key] += round(size * (n - 1) * LEAVES[kind](n))
        self._calls[key] += 1

    def _add(self, category: str, size: int) -> None:
        self.now[category] += size
        self._note()

    def _note(self) -> None:
        """Remembers what is held if it is the most so far."""
        total = self.total()
        if total > self.most:
            self.most = total
            self.peak = Counter({name: n for name, n in self.now.items() if name not in self.away})
        host = sum(self.now[name] for name in self.away)
        if host > self.host:
            self.host, self.resting = host, Counter({name: self.now[name] for name in self.away})

    def _freed(self, key: int) -> None:
        held = self._held.pop(key, None)
        if held is not None:
            self._add(held.category, -held.bytes)

    def _resized(self, storage: torch.UntypedStorage) -> None:
        held = self._held.get(storage._cdata)
        if held is not None:
            self._add(held.category, storage.nbytes() - held.bytes)
            held.bytes = storage.nbytes()


def _storage(x: Tensor) -> torch.UntypedStorage:
    return (x.to_local() if isinstance(x, DTensor) else x).untyped_storage()


def _is_group(argument: Any) -> bool:
    return isinstance(argument, torch.ScriptObject) and "ProcessGroup" in str(argument._type())


def _one(dtype: torch.dtype) -> bool | int | float:
    if dtype == torch.bool:
        return True
    return 1.0 if dtype.is_floating_point else 1
