"""The parts of a GPT as megatron-core makes them, its layers among them; and their weights by the names that
checkpoints have under every engine.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from ...kernels.mask import Mask
from ...models.block import Attend
from ...models.gpt import GPT, Block
from ...models.rope import rotate
from ..integrations import heads_of, needs_extra
from .tensor_parallel import rows_of


@dataclass(frozen=True)
class Given:
    """What a layer's attention needs of a forward, as the `packed_seq_params` that Megatron hands through to
    it. The other fields are what Megatron asks of that argument.
    """

    angles: tuple[Tensor, Tensor]
    attend: Attend
    mask: Mask
    qkv_format: str = "sbhd"
    cp_group: None = None
    local_cp_size: None = None


class Attending(nn.Module):
    """Megatron's `core_attention` for one layer: the job's layout, over the heads of this tensor-parallel
    rank. Megatron calls the constructor with more than it needs.
    """

    def __init__(self, *_: Any, rank: int, ranks: int, kv_heads: int, **__: Any) -> None:
        super().__init__()
        self.rank, self.ranks, self.kv_heads = rank, ranks, kv_heads

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **named: Any) -> Tensor:
        """q [T, B, Hq, D], k, v [T, B, Hkv, D] -> [T, B, Hq * D]."""
        given: Given = named["packed_seq_params"]
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        mask = heads_of(given.mask, self.rank, self.ranks, k.shape[2], self.kv_heads)
        out = given.attend(rotate(q, given.angles), rotate(k, given.angles), v, mask)
        return out.transpose(0, 1).flatten(2)


class Table(nn.Embedding):
    """Megatron's table of tokens as the embedding that optimizers and counts know."""

    def __init__(self, table: Any) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = table.num_embeddings, table.embedding_dim
        self.padding_idx, self.weight = None, table.weight
        # no part of this module, else its weight would have two names
        self.look_up = table.forward

    def forward(self, input: Tensor) -> Tensor:
        found: Tensor = self.look_up(input)
        return found


class Layer(nn.Module):
    """One of Megatron's layers in the place of a `Block`."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, mask: Mask) -> Tensor:
        """x [B, T, dim] -> [B, T, dim]."""
        given = Given(angles, attend, mask)
        y: Tensor = self.layer(x.transpose(0, 1).contiguous(), attention_mask=None, packed_seq_params=given)[
            0
        ]
        return y.transpose(0, 1)


class Head(nn.Module):
    """The output layer, of which the loss takes the weight: without the rows that fill up the vocabulary.

    linear: Megatron's; or the table of a model whose output layer is its embedding.
    """

    def __init__(self, linear: nn.Module, vocab: int, tp: DeviceMesh) -> None:
        super().__init__()
        self.linear, self.vocab, self.tp = linear, vocab, tp

    @property
    def weight(self) -> Tensor:
        return _whole(self.linear.weight[: _rows(self.vocab, self.tp)], 0, self.tp, self.vocab)  # type: ignore[index]


class Part(NamedTuple):
    """A tensor under its name in a checkpoint: a view of one of Megatron's, its own shape, and along which
    dimension tensor-parallel ranks hold it together; None if each has all of it.
    """

    name: str
    view: Tensor
    shape: tuple[int, ...]
    dim: int | None


@dataclass(frozen=True)
class Names:
    """Megatron's names of a GPT's tensors, and ours."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    tp: DeviceMesh

    def parts(self, name: str, x: Tensor) -> Iterator[Part]:
        """What is in a tensor shaped as the parameter of this name: its weight, or an optimizer's state."""
        if name in ("embed.weight", "head.linear.weight"):
            held = x[: _rows(self.vocab, self.tp)]
            for own in ("embed.weight", "head.weight") if self.tied else (name.replace(".linear", ""),):
                yield Part(own, held, tuple(held.shape), 0)
            return
        if not name.startswith("blocks."):
            yield Part(name, x, tuple(x.shape), None)
            return
        _, layer, rest = name.split(".", 2)
        module, kind = rest.removeprefix("layer.").rsplit(".", 1)
        for own, view, dim in self._of_layer(module, x):
            flat = (-1, *x.shape[1:]) if module.endswith(("linear_qkv", "linear_fc1")) else tuple(x.shape)
            yield Part(f"blocks.{layer}.{own}.{kind}", view, tuple(view.reshape(flat).shape), dim)

    def _of_layer(self, module: str, x: Tensor) -> Iterator[tuple[str, Tensor, int | None]]:
        match module:
            case "input_layernorm":
                yield "attention_norm", x, None
            case "pre_mlp_layernorm":
                yield "mlp_norm", x, None
            case "self_attention.linear_qkv":
                # a group after the other: its query heads, its key head, its value head
                each = self.heads // self.kv_heads
                groups = x.view(-1, each + 2, self.head_dim, *x.shape[1:])
                yield "attention.q", groups[:, :each], 0
                yield "attention.k", groups[:, each], 0
                yield "attention.v", groups[:, each + 1], 0
            case "self_attention.linear_proj":
                yield "attention.o", x, 1
            case "self_attention.q_layernorm" | "self_attention.k_layernorm":
                yield f"attention.{module.removeprefix('self_attention.')[0]}_norm", x, None
            case "mlp.linear_fc1":
                gate, up = x.view(2, -1, *x.shape[1:])
                yield "mlp.gate", gate, 0
                yield "mlp.up", up, 0
            case "mlp.linear_fc2":
                yield "mlp.down", x, 1
            case _:
                raise KeyError(module)

    def size(self, part: Part) -> int:
        """Of the whole along the dimension that tensor-parallel ranks hold together."""
        assert part.dim is not None
        vocab = part.name in ("embed.weight", "head.weight")
        return self.vocab if vocab else part.shape[part.dim] * self.tp.size()

    def whole(self, part: Part) -> Tensor:
        """A tensor of its own, or a DTensor over the ranks that hold it together."""
        own = part.view.detach().reshape(part.shape)
        if part.dim is None or self.tp.size() == 1:
            return own.clone()
        return _whole(own.clone(), part.dim, self.tp, self.size(part))

    @torch.no_grad()
    def fill(self, ours: Mapping[str, Tensor | None], given: Mapping[str, Tensor]) -> None:
        """Copies tensors by their names in a checkpoint, whole or as DTensors, to where they are in tensors
        like the parameters. Those that are not given stay.
        """
        for name, x in ours.items():
            # Megatron's layers have names for more state, without any
            for part in self.parts(name, x.detach()) if x is not None else ():
                if part.name in given:
                    part.view.copy_(self._held(part, given[part.name]).reshape(part.view.shape))

    def _held(self, part: Part, value: Tensor) -> Tensor:
        """Of what a checkpoint has, the part of this tensor-parallel rank."""
        if isinstance(value, DTensor):
            if value.device_mesh == self.tp:
                return value.to_local()
            value = value.full_tensor()
        if part.dim is None or self.tp.size() == 1:
            return value
        first, _ = rows_of(value.shape[part.dim], self.tp.size(), self.tp.get_local_rank())
        return value.narrow(part.dim, first, part.shape[part.dim])


def _rows(vocab: int, tp: DeviceMesh) -> int:
    """Rows of a vocabulary that this rank holds: the last rank's last ones may fill up only."""
    return rows_of(vocab, tp.size(), tp.get_local_rank())[1]


def _whole(own: Tensor, dim: int, tp: DeviceMesh, size: int) -> Tensor:
    """The DTensor of which this rank holds `own`; `size` is that of the whole along `dim`."""
    if tp.size() == 1:
        return own
    shape = torch.Size(size if i == dim else n for i, n in enumerate(own.shape))
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(own, tp, [Shard(dim)], run_check=False, shape=shape, stride=stride)


class Parts(NamedTuple):
    """megatron-core's GPTModel in its parts, and whole: `made`, whose last norm has the model's weight."""

    names: Names
    table: Table
    layers: list[Layer]
    head: Head
    made: Any


def parts_of(model: GPT, tp: DeviceMesh, context: int) -> Parts:
    """megatron-core's GPTModel with the sizes of this model. Weights are not set.

    context: ranks that hold a sequence together.
    """
    try:
        from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
        from megatron.core.models.gpt.gpt_model import GPTModel
        from megatron.core.transformer.spec_utils import ModuleSpec
        from megatron.core.transformer.transformer_config import TransformerConfig
    except ImportError as error:
        raise needs_extra("engine=megatron", "megatron", error) from error
    block, vocab = model.blocks[0], model.embed.num_embeddings
    assert isinstance(block, Block)
    hidden = block.mlp.gate.out_features
    config = TransformerConfig(
        num_layers=model.layers, hidden_size=model.embed.embedding_dim, num_attention_heads=model.heads,
        num_query_groups=model.kv_heads, kv_channels=model.head_dim, ffn_hidden_size=hidden,
        tensor_model_parallel_size=tp.size(), context_parallel_size=context, use_cpu_initialization=True,
        perform_initialization=False, normalization="RMSNorm", layernorm_epsilon=model.eps,
        gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False,
        add_qkv_bias=model.bias == "qkv", qk_layernorm=not isinstance(block.attention.q_norm, nn.Identity),
        hidden_dropout=0.0, attention_dropout=0.0, gradient_accumulation_fusion=False,
        bias_dropout_fusion=False, masked_softmax_fusion=False, bias_activation_fusion=False,
        apply_rope_fusion=False, params_dtype=model.embed.weight.dtype,
        # losses are shares: Megatron's DDP adds gradients up instead of averaging them
        calculate_per_token_loss=True,
    )  # fmt: skip
    spec = get_gpt_layer_local_spec(normalization="RMSNorm", qk_layernorm=config.qk_layernorm)
    own = {"rank": tp.get_local_rank(), "ranks": tp.size(), "kv_heads": model.kv_heads}
    spec.submodules.self_attention.submodules.core_attention = ModuleSpec(module=Attending, params=own)
    tied = model.head.weight is model.embed.weight
    made = GPTModel(
        config=config, transformer_layer_spec=spec, vocab_size=-(-vocab // tp.size()) * tp.size(),
        max_sequence_length=1, position_embedding_type="none", share_embeddings_and_output_weights=tied,
    )  # fmt: skip
    table = Table(made.embedding.word_embeddings)
    head = Head(table if tied else made.output_layer, vocab, tp)
    for linear in (table, head.linear):
        # rows that fill up the vocabulary would hold whatever was in memory
        nn.init.zeros_(linear.weight[_rows(vocab, tp) :])  # type: ignore[index]
    names = Names(model.layers, model.heads, model.kv_heads, model.head_dim, vocab, tied, tp)
    made.decoder.final_layernorm.weight = model.norm.weight
    return Parts(names, table, [Layer(layer) for layer in made.decoder.layers], head, made)
