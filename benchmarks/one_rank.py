"""One rank of many, alone in a process: the layouts' own code over torch's fake process group.

Nothing is computed and nothing arrives; what would be sent, what would come and what is held meanwhile is
counted.
"""

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.multiprocessing.reductions import StorageWeakRef
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from longspan.kernels.attention import partial_dtype
from longspan.kernels.mask import Mask
from longspan.kernels.options import AttentionOptions
from longspan.parallel import gather, ring, s2, single, star
from longspan.parallel.gather import Gather
from longspan.parallel.ring import Ring
from longspan.parallel.s2 import HeadSharded
from longspan.parallel.star import Star
from longspan.parallel.ulysses import InnerLayout, Ulysses

from .cases import Shape

KERNELS = (gather, ring, s2, single, star)  # modules that call the kernels
NODE = 8  # ranks of the head axis of USP


class Moved(NamedTuple):
    """Bytes of one pass on one rank: counted by the layout, and what comes and goes at the collectives.

    held: most bytes alive at a time in the inputs' dtype beyond the inputs, to 1%: keys and values, and
    queries and outputs where these travel.
    """

    counted: int
    sent: int
    arrived: int
    messages: int
    held: int


@contextlib.contextmanager
def being(rank: int, size: int) -> Iterator[None]:
    """This process is `rank` of `size`; kernels give zeros."""
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        with contextlib.ExitStack() as patches:
            for module in KERNELS:
                patches.enter_context(mock.patch.object(module, "forward", _forward))
                patches.enter_context(mock.patch.object(module, "backward", _backward))
            for module in (ring, star):
                patches.enter_context(mock.patch.object(module, "combine", _combine))
            yield
    finally:
        dist.destroy_process_group()


def layout(name: str, size: int, *, node: int = NODE) -> InnerLayout:
    """A layout of the initialised group, by the name of its yaml and, after a slash, its
    placement; USP trades heads between `node` ranks.
    """
    kind, _, placement = name.partition("/")
    if kind == "usp":
        grid = init_device_mesh("cpu", (size // node, node), mesh_dim_names=("ring", "head"))
        inner: Any = partial(Ring, placement=placement)
        return Ulysses(grid, inner=inner)
    line = init_device_mesh("cpu", (size,), mesh_dim_names=("head" if kind == "ulysses" else "ring",))
    if kind == "ulysses":
        return Ulysses(line)
    if kind == "star":
        return Star(line)
    kinds: dict[str, Any] = {"ring": Ring, "gather": Gather, "s2": HeadSharded}
    found: InnerLayout = kinds[kind](line, placement=placement)
    return found


def passes(
    layout: InnerLayout, mask: Mask, length: int, shape: Shape, dtype: torch.dtype
) -> tuple[Moved, Moved]:
    """What a forward and what a backward of one layer and one sequence moves here.

    Run with a head_dim of 1, to which all that moves is in proportion; where lse and delta travel too, which
    have none, also with 2.
    """
    one = _run(layout, mask, length, shape._replace(head_dim=1), dtype)
    fixed = isinstance(layout, Ulysses | Star)
    two = _run(layout, mask, length, shape._replace(head_dim=2), dtype) if fixed else one
    return tuple(_scaled(a, b, shape.head_dim, fixed) for a, b in zip(one, two, strict=True))  # type: ignore[return-value]


def _scaled(one: Moved, two: Moved, head_dim: int, fixed: bool) -> Moved:
    """From what moves with a head_dim of 1 and 2, what moves with `head_dim`."""
    each = [b - a if fixed else a for a, b in zip(one, two, strict=True)]
    found = Moved(*(a + (head_dim - 1) * more for a, more in zip(one, each, strict=True)))
    return found._replace(messages=one.messages)


def _run(layout: Any, mask: Mask, length: int, shape: Shape, dtype: torch.dtype) -> tuple[Moved, Moved]:
    placement, options = layout.place(length, mask), AttentionOptions()
    n, dim = placement.tokens(layout.rank), shape.head_dim
    q, k, v = (
        torch.zeros(1, n, heads, dim, dtype=dtype)
        for heads in (shape.q_heads, shape.kv_heads, shape.kv_heads)
    )
    with _Counting(layout) as counting:
        _, lse, saved = layout.forward(q, k, v, mask, placement, options)
        forward = counting.so_far()
        layout.backward(torch.zeros_like(q), torch.zeros_like(lse), saved, mask, placement, options)
        backward = counting.so_far()
        # once more, now that who needs what is known: finding it takes a million small operators
        with _Holding((q, k, v)) as holding:
            layout.forward(q, k, v, mask, placement, options)
    return forward._replace(held=holding.peak), backward


class _Counting:
    """Counts at the collectives, beside the layout's own counter."""

    def __init__(self, layout: Any) -> None:
        self.layout = layout
        self.sent = self.arrived = 0
        self._patches = contextlib.ExitStack()
        layout.traffic.reset()

    def __enter__(self) -> "_Counting":
        self._patches.enter_context(mock.patch.object(dist, "batch_isend_irecv", self._batch))
        self._patches.enter_context(mock.patch.object(dist, "all_to_all_single", self._all_to_all))
        return self

    def __exit__(self, *error: Any) -> None:
        self._patches.close()

    def so_far(self) -> Moved:
        """Since the last call."""
        traffic = self.layout.traffic
        found = Moved(sum(traffic.sent.values()), self.sent, self.arrived, traffic.messages, 0)
        traffic.reset()
        self.sent = self.arrived = 0
        return found

    def _batch(self, operations: Sequence[dist.P2POp]) -> list[dist.Work]:
        for x in operations:
            if x.op is dist.isend:
                self.sent += x.tensor.nbytes
            else:
                self.arrived += x.tensor.nbytes
        return []

    def _all_to_all(
        self, output: Tensor, input: Tensor, output_splits: list[int], input_splits: list[int], *, group: Any
    ) -> None:
        here = dist.get_rank(group)
        self.sent += (sum(input_splits) - input_splits[here]) * input.element_size()
        self.arrived += (sum(output_splits) - output_splits[here]) * output.element_size()


class _Holding(TorchDispatchMode):
    """Watches what is alive in the dtype of the inputs, beside these."""

    def __init__(self, inputs: Sequence[Tensor]) -> None:
        super().__init__()
        self.dtype, self.peak, self._bound = inputs[0].dtype, 0, 0
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._inputs = {x.untyped_storage()._cdata for x in inputs}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and x.dtype == self.dtype and x.untyped_storage().nbytes():
                self._see(x.untyped_storage())
        return result

    def _see(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._inputs or (key in self._alive and not self._alive[key][0].expired()):
            return
        self._alive[key] = StorageWeakRef(storage), storage.nbytes()
        self._bound += storage.nbytes()
        # who died is looked for when it may matter, not at each of many thousand small tensors
        if self._bound > 1.01 * self.peak:
            self._alive = {k: x for k, x in self._alive.items() if not x[0].expired()}
            self._bound = sum(size for _, size in self._alive.values())
            self.peak = max(self.peak, self._bound)


def _forward(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
    dtype, (batch, tokens, heads, _dim) = partial_dtype(q), q.shape
    return torch.zeros(q.shape, dtype=dtype), torch.zeros(batch, heads, tokens, dtype=dtype)


def _combine(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return a


def _backward(dout: Tensor, delta: Tensor, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Any:
    return tuple(torch.zeros(x.shape, dtype=partial_dtype(q)) for x in (q, k, v))
