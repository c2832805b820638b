"""megatron-core on a sequence that several ranks hold: a `core_attention` for its layer spec, which gives
context parallelism without Transformer Engine.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from ..kernels.mask import Causal, Mask, Unsupported, Window
from ..kernels.options import AttentionOptions
from ..models.rope import Rope, rotate
from ..parallel.layout import Layout, positions
from ..parallel.placement import Placement, zigzag
from ..parallel.ring import Ring
from .integrations import CAUSAL, Binding, heads_of, needs_extra, refuse_given

INSTEAD = "pass a megatron.PackedSequence as packed_seq_params: its mask says who sees whom"


@dataclass(frozen=True)
class PackedSequence:
    """One micro batch's placement and mask, for the `packed_seq_params` of Megatron's GPTModel.

    Megatron hands that argument through to every layer, also when it computes one again in the backward, so
    that no state is left between micro batches. The other fields are what Megatron asks of it.
    """

    placement: Placement
    mask: Mask = CAUSAL
    qkv_format: str = "sbhd"
    cp_group: None = None
    local_cp_size: None = None

    @property
    def max_seqlen_q(self) -> int:
        """Tokens of the whole sequence, which only Megatron's own RoPE asks for, to cut its zigzag from."""
        if self.placement != megatron_placement(self.placement.length, self.placement.size):
            raise Unsupported(
                "Megatron's own RoPE places tokens in its zigzag; take that placement (None for "
                "packed_seq_params, or zigzag(length, ranks)), or position_embedding_type='none' and "
                "core_attention(rope=...)"
            )
        return self.placement.length

    @property
    def max_seqlen_kv(self) -> int:
        return self.max_seqlen_q


def context_parallel(
    make: Callable[[DeviceMesh], Layout] = Ring, *, axis: str = "ring", device: str | None = None
) -> Layout:
    """A layout over Megatron's context-parallel group; call after initialize_model_parallel, on all ranks.

    make: Ring, or what is called with the mesh of one axis: `Ulysses` with axis="head". device: that of the
    mesh; None means cuda where there is one.
    """
    try:
        from megatron.core import parallel_state
    except ImportError as error:
        raise needs_extra("context_parallel", "megatron", error) from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    group = parallel_state.get_context_parallel_group()
    mesh = DeviceMesh.from_group(group, device, mesh_dim_names=(axis,))
    # point-to-point edges may leave ranks out, which must not be the first thing a group ever does
    dist.all_reduce(torch.zeros(1, device=device), group=group)
    return make(mesh)


def core_attention(layout: Layout, *, rope: Rope | None = None, kv_heads: int | None = None) -> Any:
    """The ModuleSpec to put at `self_attention.submodules.core_attention` of a layer spec.

    rope: turns q and k here, at the positions of the placement, with position_embedding_type='none'.
    kv_heads: the model's num_query_groups, needed where it is less than the tensor-parallel size and the
    mask differs by head.
    """
    try:
        from megatron.core.transformer.spec_utils import ModuleSpec
    except ImportError as error:
        raise needs_extra("core_attention", "megatron", error) from error
    params = {"layout": layout, "rope": rope, "kv_heads": kv_heads}
    return ModuleSpec(module=LongspanCoreAttention, params=params)


class LongspanCoreAttention(nn.Module):
    """Attention of one layer; Megatron calls the constructor with all but the last three.

    Without `packed_seq_params` the tokens are taken to be spread as Megatron's get_batch_on_this_cp_rank
    spreads them, under a causal mask. Refuses, when built, what it cannot serve.
    """

    def __init__(
        self, config: Any, layer_number: int, attn_mask_type: Any, attention_type: str,
        attention_dropout: float | None = None, softmax_scale: float | None = None,
        cp_comm_type: str | None = None, pg_collection: Any = None, *, layout: Layout,
        rope: Rope | None = None, kv_heads: int | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        if dropout or attention_type != "self" or config.softmax_type != "vanilla" or config.qk_clip:
            raise Unsupported(
                f"core_attention serves self-attention with attention_dropout=0, softmax_type='vanilla' and "
                f"qk_clip=False, not {attention_type!r}, {dropout}, {config.softmax_type!r}, {config.qk_clip}"
            )
        if layout.size != config.context_parallel_size:
            raise ValueError(
                f"the layout has {layout.size} ranks, context_parallel_size is "
                f"{config.context_parallel_size}; build the layout with context_parallel()"
            )
        self.layout, self.rope, self.kv_heads = layout, rope, kv_heads
        self.options = AttentionOptions(scale=softmax_scale)
        self.own, self.mask_type = _layer_mask(config, layer_number), attn_mask_type
        tp = None if pg_collection is None else pg_collection.tp
        self.tp_rank: int = 0 if tp is None else tp.rank()
        self.tp: int = 1 if tp is None else tp.size()
        self.groups: int = config.num_query_groups

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None = None,
        attn_mask_type: Any = None, attention_bias: Tensor | None = None, packed_seq_params: Any = None,
    ) -> Tensor:  # fmt: skip
        """Local q [N, B, Hq, D], k, v [N, B, Hkv, D] -> [N, B, Hq * D]."""
        refuse_given(
            "core_attention", {"attention_mask": attention_mask, "attention_bias": attention_bias}, INSTEAD
        )
        kind = self.mask_type if attn_mask_type is None else attn_mask_type
        if kind.name != "causal":
            raise Unsupported(f"attn_mask_type is {kind.name}; core_attention serves causal. {INSTEAD}")
        given = packed_seq_params
        if given is None:
            given = PackedSequence(megatron_placement(len(query) * self.layout.size, self.layout.size))
        elif not isinstance(given, PackedSequence):
            raise Unsupported(f"packed_seq_params is a {type(given).__name__}; {INSTEAD}")
        q, k, v = (x.transpose(0, 1) for x in (query, key, value))
        if self.rope is not None:
            at = positions(self.layout, given.placement, q.device)
            angles = self.rope.angles(at, q.shape[3])
            q, k = rotate(q, angles), rotate(k, angles)
        bound = Binding(self.layout, given.placement, self._global_heads(given.mask, k.shape[2]))
        out = bound.attention(q, k, v, own=self.own, options=self.options)
        return out.transpose(0, 1).flatten(2)

    def _global_heads(self, mask: Mask, held: int) -> Mask:
        """The mask bound to the model's kv heads that this tensor-parallel rank holds."""
        if self.tp == 1 or not mask.per_head:
            return mask
        if self.kv_heads is None and self.groups == self.tp:
            # Megatron gives this number both for one head a rank and for a head that several ranks share
            raise Unsupported(
                f"{mask} differs by head, and num_query_groups may be less than the {self.tp} "
                f"tensor-parallel ranks; say which: core_attention(kv_heads=num_query_groups)"
            )
        return heads_of(mask, self.tp_rank, self.tp, held, self.kv_heads or self.groups)


def megatron_placement(length: int, size: int) -> Placement:
    """Where get_batch_on_this_cp_rank puts tokens: our zigzag, of equal pieces. ValueError for a length that
    it cannot cut.
    """
    if size > 1 and length % (2 * size):
        raise ValueError(
            f"Megatron cuts sequences into {2 * size} equal pieces, but this has {length} tokens; pass a "
            f"PackedSequence with a placement of its own as packed_seq_params"
        )
    return zigzag(length, size)


def _layer_mask(config: Any, layer_number: int) -> Mask:
    """Causal, within window_size in the layers that have one: layers count from 1, and every
    window_attn_skip_freq-th has none, or a list says which have.
    """
    skip = config.window_attn_skip_freq
    if isinstance(skip, int):
        windowed = layer_number % skip != 0
    else:
        windowed = skip is None or bool(skip[layer_number - 1])
    if not config.window_size or not windowed:
        return Causal()
    left, right = config.window_size
    if right > 0:
        raise Unsupported(f"window_size is {config.window_size}; a causal model's must end in 0")
    return Causal() if left < 0 else Window(left, 0)
