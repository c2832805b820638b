"""Hugging Face transformers on a sequence that several ranks hold: `attn_implementation="longspan"`."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from inspect import signature
from typing import Any

from torch import Tensor, nn

from ..kernels.mask import Causal, Mask, Unsupported, Window
from ..kernels.options import AttentionOptions
from ..parallel.layout import Layout
from ..parallel.placement import Placement
from .agree import refuse_together
from .integrations import CAUSAL, Binding, local_positions, needs_extra, refuse_given

NAME = "longspan"
# Layers that attention, and nothing else, mixes tokens in; all others would take a shard for the whole.
LAYERS = ("full_attention", "sliding_attention")
# What a multimodal model makes bidirectional blocks or other sequences from.
OTHER_INPUTS = ("token_type_ids", "mm_token_type_ids", "encoder_hidden_states", "cu_seq_lens_q")
# Arguments of other models' attention that change its result.
OTHER_ARGUMENTS = ("position_bias", "cache", "indices", "block_indices", "cu_seq_lens_q", "output_attentions")

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def register() -> None:
    """Makes `attn_implementation="longspan"` known to transformers in this process; may be called again.

    ModuleNotFoundError, naming the extra, if transformers is not installed.
    """
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise needs_extra(f"attn_implementation={NAME!r}", "transformers", error) from error
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, no_mask)


@contextmanager
def sequence(model: nn.Module, layout: Layout, placement: Placement, mask: Mask = CAUSAL) -> Iterator[None]:
    """Within it, each forward of `model`, a causal decoder of transformers, is one over this rank's tokens.
    All ranks of the layout run it together: one that refuses its tokens or its padding stops them all.

    mask: who may see whom over the whole sequence, packed documents included; each layer adds its own
    causality and sliding window. `position_ids` are the placement's unless given, the cache is off. The
    sequence goes to the layers as an argument of the forward, so that a checkpointed block that runs
    again in the backward, also after the `with`, sees its own. Unsupported for a model that mixes tokens in
    ways that this does not see, ValueError for one without attn_implementation="longspan".
    """
    base = model.base_model
    assert isinstance(base, nn.Module)
    check(model, layout, placement)
    bound = Binding(layout, placement, mask)
    hooks = [
        model.register_forward_pre_hook(_refuse, with_kwargs=True),
        base.register_forward_pre_hook(_give(bound), with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def check(model: nn.Module, layout: Layout, placement: Placement) -> None:
    """Unsupported or ValueError for what `sequence` cannot serve, from config and placement alone, so on all
    ranks alike.
    """
    config: Any = model.config
    text, name = config.get_text_config(), type(model).__name__
    if text._attn_implementation != NAME:
        raise ValueError(
            f"{name} has attn_implementation={text._attn_implementation!r}, which would attend within the "
            f"shard only; call register() and model.set_attn_implementation({NAME!r})"
        )
    others = sorted(set(getattr(text, "layer_types", None) or LAYERS) - {*LAYERS})
    if others or model._is_stateful:
        told = ", ".join(others) or "recurrent layers"
        raise Unsupported(f"{name} has {told}, of which each rank would see its shard only; take a model of "
                          f"{' and '.join(LAYERS)}")  # fmt: skip
    backward = getattr(text, "is_causal", True) and not getattr(text, "use_bidirectional_attention", None)
    if not backward or config.is_encoder_decoder or not model._supports_attention_backend:
        raise Unsupported(f"{name}: {NAME} serves causal decoders that use transformers' AttentionInterface")
    for kind in _rope_types(getattr(text, "rope_parameters", None)):
        if layout.size > 1 and kind in ("dynamic", "longrope"):
            raise Unsupported(f"{name}: rope_type={kind!r} looks at the greatest position of the shard, so "
                              f"ranks would differ; take default, linear, llama3 or yarn")  # fmt: skip
    if any(placement.tokens(r) == 0 for r in range(placement.size)):
        raise Unsupported(
            f"{placement.length} tokens leave one of {placement.size} ranks without any, which transformers "
            f"cannot run; take longer sequences or fewer ranks"
        )


def attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    scaling: float | None = None, dropout: float = 0.0, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, is_causal: bool | None = None,
    longspan: Binding | None = None, **rest: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """transformers' attention function: local q [B, Hq, N, D], k, v [B, Hkv, N, D] -> [B, N, Hq, D].

    Unsupported for a layer whose attention the masks and options here do not express.
    """
    if longspan is None:
        raise ValueError(f"{type(module).__name__} attends outside of `with hf.sequence(model, ...)`")
    given = {name: rest.get(name) for name in OTHER_ARGUMENTS}
    refuse_given(
        f"{type(module).__name__} with attn_implementation={NAME!r}",
        given | {"dropout": dropout, "attention_mask": attention_mask},
        "set attention_dropout=0, pass no mask of your own: who sees whom is said by sequence(mask=...)",
    )
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise Unsupported(f"{type(module).__name__} is not causal; {NAME} serves causal decoders")
    if key.shape != value.shape or key.shape[2] != query.shape[2]:
        raise Unsupported(
            f"q, k, v are {tuple(query.shape)}, {tuple(key.shape)}, {tuple(value.shape)}; {NAME} serves "
            f"self-attention without a cache whose values have the head dim of the keys"
        )
    _check_heads(module, longspan.mask, key.shape[1])
    out = longspan.attention(
        *(x.transpose(1, 2) for x in (query, key, value)), own=_own_mask(module, sliding_window), sink=s_aux,
        options=AttentionOptions(scale=scaling, softcap=softcap or 0.0),
    )  # fmt: skip
    return out.contiguous(), None


def no_mask(*, use_vmap: bool = False, **rest: Any) -> None:
    """transformers' mask function: None, since the sequence says who sees whom; padding was refused before.
    Unsupported for a model's own additions to the causal mask.
    """
    if use_vmap:
        raise Unsupported(f"the model adds a mask function of its own, which {NAME} cannot express")


def _own_mask(module: nn.Module, sliding_window: int | None) -> Mask:
    """The layer's own: causal, within its sliding window if it has one."""
    config: Any = getattr(module, "config", None)
    types = getattr(config, "layer_types", None)
    if sliding_window is None and types and types[module.layer_idx] == "sliding_attention":
        sliding_window = config.sliding_window
    # transformers counts the query itself
    return Causal() if sliding_window is None else Window(sliding_window - 1, 0)


def _check_heads(module: nn.Module, mask: Mask, held: int) -> None:
    heads = getattr(getattr(module, "config", None), "num_key_value_heads", held)
    if mask.per_head and held != heads:
        raise Unsupported(
            f"{mask} differs by head, and this layer holds {held} of {heads} kv heads; "
            f"take a model without tensor parallelism, or a mask that is the same for all heads"
        )


def _refuse(model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """What a caller may not pass, before anything is computed."""
    if kwargs.get("labels") is not None:
        raise Unsupported(
            f"{type(model).__name__} would shift labels within the shard, which is wrong at its borders; "
            f"take shard_batch's labels and integrations.loss(logits, labels, valid)"
        )
    given = {name: kwargs.get(name) for name in ("use_cache", "past_key_values", *OTHER_INPUTS)}
    refuse_given(f"{type(model).__name__} with {NAME}", given, "it serves training on text without a cache")


def _give(bound: Binding) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], Inputs]:
    """Adds the sequence to the inputs of the decoder, once every rank's are what they must be."""

    def give(base: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Inputs:
        given = signature(base.forward).bind_partial(*args).arguments | kwargs
        x: Tensor = next(given[n] for n in ("input_ids", "inputs_embeds") if given.get(n) is not None)
        refuse_together(
            _misfit(type(base).__name__, x, given.get("attention_mask"), bound), bound.layout.group
        )
        refuse_given(type(base).__name__, {"past_key_values": given.get("past_key_values")}, "pass none")
        if kwargs.get("position_ids") is None:
            kwargs["position_ids"] = local_positions(bound.layout, bound.placement, x.device)
        return args, kwargs | {"use_cache": False, NAME: bound}

    return give


def _misfit(name: str, x: Tensor, attention_mask: Any, bound: Binding) -> ValueError | None:
    """What is wrong with the inputs of this rank, which other ranks cannot see."""
    held = bound.placement.tokens(bound.layout.rank)
    if x.shape[1] != held:
        return ValueError(
            f"{name} was given {x.shape[1]} tokens, but rank {bound.layout.rank} holds {held} of "
            f"{bound.placement.length}; shard the batch with integrations.shard_batch"
        )
    # a mask of another shape is one of the caller's own, which `attend` refuses
    if isinstance(attention_mask, Tensor) and attention_mask.ndim == 2 and not bool(attention_mask.all()):
        return Unsupported(
            f"attention_mask marks padding; with attn_implementation={NAME!r} pack documents "
            f"(mask=Documents(...)), or pad on the right with labels of -100 and pass no attention_mask"
        )
    return None


def _rope_types(parameters: Any) -> Iterator[str]:
    """Every rope_type in a config's rope_parameters, which may be nested by the type of layer."""
    if isinstance(parameters, dict):
        if "rope_type" in parameters:
            yield parameters["rope_type"]
        for value in parameters.values():
            yield from _rope_types(value)
