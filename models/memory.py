"""What a model's blocks keep for their backward: all, their inputs, or nothing on the device."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from .adaln import Mlp, SequentialMlp
from .block import Attention, SwiGLU
from .offload import Host
from .tiled import by_head_groups, by_tiles

Recompute = Literal["none", "block", "keep_attention"]
Recipe = Literal["tensorwise", "rowwise", "rowwise_with_gw_hp"]


@dataclass(frozen=True)
class Memory:
    """Ways to hold less and work faster; none but `weights` and `float8` changes what is computed.

    recompute: `block` keeps each block's input and computes the block again in the backward (Chen et al.
    2016); `keep_attention` does so but keeps attention's q, k, v, out and lse, so that the part of the work
    that grows with the square of the length is not done twice. every: of so many blocks one is left as it
    is; 0 leaves none. offload: what blocks keep rests in host memory until their backward. mlp_tile: tokens
    that an MLP takes at once, forward and in the backward, which computes it again (ALST: Bekman et al. 2025,
    section 3.1); 0 takes all. head_chunks: rounds in which attention takes its kv heads, each computed
    again in the backward; for models of `block.Attention`. weights: bfloat16 halves them and their gradients;
    updates are made in float32 and rounded by chance. optimizer: `host`: its state rests in host memory, and
    comes to the device one weight at a time (engines that hold whole weights). float8: the recipe by which
    linear layers of blocks multiply; true is tensorwise.
    """

    recompute: Recompute = "none"
    every: int = 0
    offload: bool = False
    mlp_tile: int = 0
    head_chunks: int = 1
    weights: Literal["float32", "bfloat16"] = "float32"
    optimizer: Literal["device", "host"] = "device"
    float8: bool | Recipe = False

    def __post_init__(self) -> None:
        if self.recompute not in get_args(Recompute):
            raise ValueError(
                f"memory.recompute is {self.recompute!r}; it can be {', '.join(get_args(Recompute))}"
            )
        if self.weights not in ("float32", "bfloat16"):
            raise ValueError(f"memory.weights is {self.weights!r}; it can be float32 or bfloat16")
        if self.optimizer not in ("device", "host"):
            raise ValueError(f"memory.optimizer is {self.optimizer!r}; it can be device or host")
        if not isinstance(self.float8, bool) and self.float8 not in get_args(Recipe):
            raise ValueError(
                f"memory.float8 is {self.float8!r}; it can be false, true, {', '.join(get_args(Recipe))}"
            )
        if self.float8 and self.head_chunks > 1:
            raise ValueError(
                f"memory.float8 is {self.float8}; memory.head_chunks={self.head_chunks} takes a few rows of "
                "plain layers: set memory.head_chunks=1"
            )
        for name, least in (("every", 0), ("mlp_tile", 0), ("head_chunks", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"memory.{name} is {getattr(self, name)}; it must be at least {least}")
        if self.every == 1:
            raise ValueError("memory.every is 1, which recomputes no block: set memory.recompute=none")
        if self.offload and self.recompute == "none":
            raise ValueError("memory.offload is true; it needs memory.recompute=block or keep_attention")

    def apply(self, model: nn.Module) -> Host | None:
        """Changes how `model.blocks` run in training; names of parameters stay. The host memory, if
        offloading.

        ValueError if the model has nothing that a setting serves.
        """
        if self.weights == "bfloat16":
            _narrow(model)
        blocks = list(cast(nn.ModuleList, model.blocks))
        if self.mlp_tile:
            kinds = SwiGLU, Mlp, SequentialMlp
            self._each(blocks, kinds, "mlp_tile", partial(by_tiles, self.mlp_tile))
        if self.head_chunks > 1:
            self._each(blocks, (Attention,), "head_chunks", partial(by_head_groups, self.head_chunks))
        host = Host() if self.offload else None
        if self.recompute != "none":
            for i, block in enumerate(blocks):
                if not self.every or (i + 1) % self.every:
                    run = partial(_recomputed, self.recompute == "keep_attention", host)
                    block.forward = partial(run, block.forward)
        return host

    def _each(
        self, blocks: list[nn.Module], kinds: tuple[type[nn.Module], ...], name: str,
        change: Callable[[Any], Callable[..., Tensor]],
    ) -> None:  # fmt: skip
        found = [m for block in blocks for m in block.modules() if isinstance(m, kinds)]
        if not found:
            words = ", ".join(kind.__name__ for kind in kinds)
            raise ValueError(
                f"memory.{name} is {getattr(self, name)}; it serves {words}, and the model has none"
            )
        for module in found:
            module.forward = change(module)


def _narrow(model: nn.Module) -> None:
    """Puts bfloat16 parameters and buffers in the place of others, one for those that are shared. (A fake
    tensor's data cannot be exchanged, as `Module.bfloat16` does.)
    """
    # with each what it stands for, whose id must not be given to another
    made: dict[int, tuple[Tensor, Tensor]] = {}
    for module in model.modules():
        for kept in (module._parameters, module._buffers):
            for name, x in kept.items():
                if x is None or not x.is_floating_point():
                    continue
                if id(x) not in made:
                    low = x.detach().bfloat16()
                    made[id(x)] = (
                        x,
                        nn.Parameter(low, x.requires_grad) if isinstance(x, nn.Parameter) else low,
                    )
                kept[name] = made[id(x)][1]  # type: ignore[assignment]


def _recomputed(keep: bool, host: Host | None, block: Callable[..., Any], *args: Any) -> Any:
    """block(*args), which keeps only what it was given (and attention's results if `keep`)."""
    if not torch.is_grad_enabled():
        return block(*args)
    kept: list[_Kept] = []
    if keep:
        kept = [_Kept(a, host) for a in args if _attends(a)]
        args = tuple(kept[0] if _attends(a) else a for a in args)
    with _saving(host):
        return checkpoint(block, *args, use_reentrant=False, context_fn=lambda: (nullcontext(), _again(kept)))


def _attends(argument: Any) -> bool:
    return callable(argument) and not isinstance(argument, nn.Module)


def _saving(host: Host | None) -> AbstractContextManager[Any]:
    return nullcontext() if host is None else host.hooks()


@contextmanager
def _again(kept: Sequence["_Kept"]) -> Iterator[None]:
    """While a block is computed once more."""
    for attend in kept:
        attend.taken = 0
    try:
        yield
    finally:
        for attend in kept:
            attend.taken = None


class _Kept:
    """An `attend` that works once. When its block is computed again it gives the same results without work:
    the graph of the first time, with all that attention saved, is the one that the backward walks.
    """

    def __init__(self, attend: Callable[..., Any], host: Host | None) -> None:
        self.attend, self.host = attend, host
        self.results: list[tuple[Any, ...]] = []
        # while the block is computed again: results given so far
        self.taken: int | None = None

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self.taken is not None:
            self.taken += 1
            again = tuple(self._back(x).detach().requires_grad_() for x in self.results[self.taken - 1])
            return again if len(again) > 1 else again[0]
        # hooks of its own, for those of the checkpoint would drop what attention saves
        with _plain() if self.host is None else self.host.hooks():
            result = self.attend(*args, **kwargs)
        parts = result if isinstance(result, tuple) else (result,)
        # without their graph, which would hold this object in a circle
        self.results.append(tuple(self._away(x.detach()) for x in parts))
        return result

    def _away(self, x: Tensor) -> Any:
        return x if self.host is None else self.host.pack(x)

    def _back(self, x: Any) -> Tensor:
        return x if self.host is None else self.host.unpack(x)


def _plain() -> saved_tensors_hooks:
    """What is saved stays as it is, whatever hooks are outside."""
    return saved_tensors_hooks(lambda x: x, lambda x: x)
