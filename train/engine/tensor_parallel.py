"""Tensor parallelism: the ranks of the axis tp hold each layer of a GPT together, some heads, some of the
MLP's width and some of the vocabulary each (Shoeybi et al. 2019, section 3).
"""

import copy
from collections.abc import Callable
from typing import Any

import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from ...kernels.loss import Rows
from ...models.gpt import GPT, Block
from ..integrations import heads_of
from .shared_tokens import SharedTokens

WHOLE, COLUMNS, ROWS = Replicate(), Shard(0), Shard(1)


def check(model: nn.Module, size: int) -> None:
    """ValueError, saying what would work, if `size` ranks cannot hold the layers of this model together."""
    said = f"parallel.mesh.tp is {size}"
    if not isinstance(model, GPT):
        raise ValueError(f"{said}; it splits the layers of GPT, not of {type(model).__name__}: set it to 1")
    block = model.blocks[0]
    assert isinstance(block, Block)
    sizes = {"heads": model.heads, "kv_heads": model.kv_heads, "hidden": block.mlp.gate.out_features}
    fits = [n for n in range(1, min(sizes.values()) + 1) if all(x % n == 0 for x in sizes.values())]
    for name, count in sizes.items():
        if count % size:
            works = ", ".join(map(str, fits))
            raise ValueError(f"{said}, and model.{name} {count}: tp must divide it; {works} would do")
    vocab = model.embed.num_embeddings
    if rows_of(vocab, size, size - 1)[1] < 1:
        raise ValueError(f"{said}, and model.vocab {vocab}: each rank must hold some of it; take less tp")
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and type(module) is not nn.Linear:
            kind = type(module).__name__
            raise ValueError(f"{said}; it splits plain layers, and {name} is a {kind}: set lora.rank=0")
    if "forward" in vars(block.attention):
        raise ValueError(f"{said}, which splits the heads already: set memory.head_chunks=1")


def split(model: GPT, mesh: DeviceMesh) -> None:
    """Makes the parameters DTensors over `mesh`, the axis tp, and lets modules work on what is held here.

    Attention has the heads of this rank, with the masks that these have among all heads. Between attention
    and MLP a rank has some of the tokens only (sequence parallelism: Korthikanti et al. 2022, section 4.2.2),
    norms included; the model's result has all on every rank, and takes its gradient in addends, as the loss
    with `Rows` gives it.
    """
    tokens, tied = SharedTokens(mesh.get_group()), model.head.weight is model.embed.weight
    _place(model.embed, mesh, COLUMNS)
    model.embed.forward = _lookup(model.embed, tokens)  # type: ignore[method-assign]
    _place(model.head, mesh, COLUMNS)
    if tied:
        model.head.weight = model.embed.weight
    if model.mix is not None:
        _place(model.mix, mesh, WHOLE)
        _local(model.mix)
    model.blocks[0].register_forward_pre_hook(lambda _, args: (tokens.cut(args[0]), *args[1:]))
    for block in model.blocks:
        assert isinstance(block, Block)
        _split_block(block, mesh, tokens, model.kv_heads)
    _place(model.norm, mesh, WHOLE)
    _local(model.norm, addends=True)
    model.norm.register_forward_hook(lambda _, args, x: tokens.join(x))


def held(weight: Tensor) -> tuple[Tensor, Rows | None]:
    """The rows of an output layer that this rank holds, and which they are; None: all."""
    if not isinstance(weight, DTensor):
        return weight, None
    mesh = weight.device_mesh
    group = mesh.get_group()

    def reduced(how: dist.ReduceOp.RedOpType) -> Callable[[Tensor], Tensor]:
        def reduce(x: Tensor) -> Tensor:
            dist.all_reduce(x, how, group=group)
            return x

        return reduce

    first, _ = rows_of(len(weight), mesh.size(), mesh.get_local_rank())
    return weight.to_local(), Rows(first, len(weight), reduced(dist.ReduceOp.MAX), reduced(dist.ReduceOp.SUM))


def _split_block(block: Block, mesh: DeviceMesh, tokens: SharedTokens, kv_heads: int) -> None:
    attention, mlp = block.attention, block.mlp
    for layer in (attention.q, attention.k, attention.v, mlp.gate, mlp.up):
        _place(layer, mesh, COLUMNS)
        _local(layer)
    for layer in (attention.o, mlp.down):
        _place(layer, mesh, ROWS)
        _local(layer, addends=True, once=tokens.rank == 0)
    # of these each rank sees some tokens, or some heads, only
    for norm in (block.attention_norm, block.mlp_norm, attention.q_norm, attention.k_norm):
        _place(norm, mesh, WHOLE)
        _local(norm, addends=True)
    each = kv_heads // tokens.size

    def entered(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x, angles, attend, mask = args
        own = heads_of(mask, tokens.rank, tokens.size, each, kv_heads)
        return tokens.join(x), angles, attend, own

    attention.register_forward_pre_hook(entered)
    mlp.register_forward_pre_hook(lambda _, args: (tokens.join(args[0]),))
    for module in (attention, mlp):
        module.register_forward_hook(lambda _, args, x: tokens.sum(x))


def _place(module: nn.Module, mesh: DeviceMesh, placement: Placement) -> None:
    """A bias beside rows is whole."""
    for name, p in list(module.named_parameters(recurse=False)):
        here = WHOLE if p.ndim <= getattr(placement, "dim", 0) else placement
        # the ranks have made the same weights, so each takes its own
        own = distribute_tensor(p.detach(), mesh, [here], src_data_rank=None)
        setattr(module, name, nn.Parameter(own, requires_grad=p.requires_grad))


def _local(module: nn.Module, *, addends: bool = False, once: bool = True) -> None:
    """Lets the module work on plain tensors: the input that it gets, and what is held here of its weights.

    addends: ranks give different addends of the gradient of what is whole. once: this rank adds the bias,
    where the results of ranks are added up.
    """
    # a module like this one, without parameters of its own: they are lent to it
    twin = copy.copy(module)
    twin._parameters = dict.fromkeys(module._parameters)
    names = [name for name, _ in module.named_parameters(recurse=False)]

    def forward(*args: Any) -> Any:
        for name in names:
            p = getattr(module, name)
            grads = [Partial()] if addends and p.placements[0].is_replicate() else None
            own = p.to_local(grad_placements=grads)
            vars(twin)[name] = own if once or name != "bias" else own * 0
        try:
            return twin.forward(*args)
        finally:
            # else weights that were gathered would stay
            for name in names:
                vars(twin).pop(name, None)

    module.forward = forward


def _lookup(embed: nn.Embedding, tokens: SharedTokens) -> Callable[..., Tensor]:
    """Rows of a table that ranks hold together: each looks up its own."""

    def forward(ids: Tensor) -> Tensor:
        weight, rows = held(embed.weight)
        assert rows is not None
        at = ids - rows.first
        mine = (at >= 0) & (at < len(weight))
        found = F.embedding(at.where(mine, 0), weight)
        return tokens.total(found.masked_fill(~mine[..., None], 0.0))

    return forward


def rows_of(count: int, size: int, rank: int) -> tuple[int, int]:
    """The first of `count` rows that a rank holds, and how many it holds, as `Shard` has it."""
    each = -(-count // size)
    first = min(rank * each, count)
    return first, min(each, count - first)
