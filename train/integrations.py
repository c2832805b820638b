"""Longspan inside somebody else's model: attention bound to a sequence, shards of a batch, the loss over
them.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.attention import merge
from ..kernels.mask import Causal, Documents, Full, Mask, Offsets, Unsupported, Window
from ..kernels.options import AttentionOptions
from ..parallel.layout import Layout, positions, shard
from ..parallel.placement import Placement
from .data.sample import IGNORE

DEFAULT = AttentionOptions()
CAUSAL = Causal()


@dataclass(frozen=True)
class Binding:
    """What attention needs besides q, k and v: how tokens are spread, and who may see whom."""

    layout: Layout
    placement: Placement
    mask: Mask = CAUSAL

    def attention(
        self, q: Tensor, k: Tensor, v: Tensor, *, own: Mask | None = None, sink: Tensor | None = None,
        options: AttentionOptions = DEFAULT,
    ) -> Tensor:  # fmt: skip
        """Local q [B, N, Hq, D], k, v [B, N, Hkv, D] -> [B, N, Hq, D] in q's dtype, differentiable.

        own: the layer's mask, which must hold beside the sequence's. sink: a learned score a query head,
        [Hq], that takes weight and gives nothing (gpt-oss); merged once, after the last hop.
        """
        mask = self.mask if own is None else narrowed(self.mask, own)
        out, lse = self.layout.attention(q, k, v, mask, self.placement, options=options)
        if sink is None:
            return out
        if lse is None:
            raise ValueError(f"an attention sink needs normalizer=softmax, not {options.normalizer!r}")
        whole, _ = merge((out, lse), (torch.zeros_like(out), sink.to(lse.dtype)[None, :, None]))
        return whole.to(q.dtype)


def longspan_attention(
    layout: Layout, placement: Placement, mask: Mask = CAUSAL, *, options: AttentionOptions = DEFAULT
) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """`attend(q, k, v)` for a module of one's own: local [B, N, H, D] in and out, differentiable.

    It gives for the tokens held here what one device would give for the whole sequence under `mask`.
    """

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return Binding(layout, placement, mask).attention(q, k, v, options=options)

    return attend


def narrowed(mask: Mask, own: Mask) -> Mask:
    """`mask` and a layer's own, which is Full, Causal or a Window: the same keys as `mask & own`, said
    as briefly as it can be, since each predicate is evaluated at every score of a partial tile.
    """
    if isinstance(own, Full) or mask == own:
        return mask
    backward = isinstance(own, Causal) or (isinstance(own, Window) and own.right == 0)
    if isinstance(mask, Full) or (isinstance(mask, Causal) and backward):
        return own
    if isinstance(mask, Documents):
        # only k - q matters to `own`, so that it is the same within a document
        return Documents(mask.offsets, inner=narrowed(mask.inner or Full(), own))
    return mask & own


@dataclass(frozen=True)
class Local:
    """What one rank holds of a batch, int64 [B, N]; `labels` are the *next* tokens, `valid` counts those of
    the whole batch, over all ranks, that are not ignored.
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor
    valid: int


def shard_batch(
    layout: Layout, placement: Placement, input_ids: Tensor, labels: Tensor | None = None, *,
    offsets: Offsets | None = None,
) -> Local:  # fmt: skip
    """This rank's part of whole sequences `input_ids`, int64 [B, T], the same on all ranks of the layout.

    labels: [B, T], aligned with the inputs as Hugging Face has them, -100 where ignored; None means the
    inputs. They are moved by one here, on the whole sequence: moved on a shard they would be wrong at its
    borders. offsets: starts of packed documents (see `Documents`): a document's last token predicts
    nothing, and positions restart. ValueError if the shapes or the placement do not fit.
    """
    labels = input_ids if labels is None else labels
    if input_ids.ndim != 2 or labels.shape != input_ids.shape:
        raise ValueError(
            f"input_ids and labels must both be [batch, tokens], got {tuple(input_ids.shape)} and "
            f"{tuple(labels.shape)}"
        )
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)
    at = torch.arange(input_ids.shape[1], device=input_ids.device)[None]
    if offsets is not None:
        starts, which = Documents(offsets).starts(at)
        last = F.pad(which[:, 1:] != which[:, :-1], (0, 1))
        following, at = following.masked_fill(last, IGNORE), at - starts
    at = at.expand_as(input_ids)
    valid = int((following != IGNORE).sum())
    ids, following, at = (shard(layout, x, placement, 1) for x in (input_ids, following, at))
    return Local(ids, following, at, valid)


def local_positions(layout: Layout, placement: Placement, device: torch.device | None = None) -> Tensor:
    """Global positions of the tokens held here, as models take them: int64 [1, N]."""
    return positions(layout, placement, device)[None]


def loss(logits: Tensor, labels: Tensor, denominator: float) -> Tensor:
    """This rank's share of the mean cross entropy, nats: its sum over the *global* count of valid tokens.

    logits [B, N, V] and labels [B, N] of `shard_batch`, not shifted again; float32 (float64 for float64).
    The shares of all ranks add up to the loss of one device, and so do the gradients (`sum_gradients`).
    `kernels.loss.linear_cross_entropy` does the same from hidden states, without ever holding the logits.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    flat = F.cross_entropy(
        logits.flatten(0, 1).to(dtype), labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    return flat / max(denominator, 1)


def sum_gradients(module: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Adds the gradients of all parameters over the ranks of `group` (a layout's; None: nothing to do), in
    float32 at least, and rounds each sum once.

    A rank that has no gradient of a parameter, such as that of an expert none of its tokens went to, takes
    part with zeros.
    """
    if group is None:
        return
    for p in module.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            whole = p.grad.to(torch.promote_types(p.grad.dtype, torch.float32))
            dist.all_reduce(whole, group=group)
            p.grad.copy_(whole)


def heads_of(mask: Mask, rank: int, size: int, held: int, of: int) -> Mask:
    """The mask bound to the `held` of the model's `of` kv heads that this rank of `size` tensor-parallel ones
    holds; ranks that outnumber the heads share them.
    """
    if size == 1 or not mask.per_head:
        return mask
    first = rank * held
    return mask.heads([(first + i) * of // (size * held) for i in range(held)], of)


def needs_extra(what: str, extra: str, error: ImportError) -> ModuleNotFoundError:
    """The error for a package that is not installed: which extra brings it."""
    return ModuleNotFoundError(f"{what} needs {error.name or extra}: pip install longspan[{extra}]")


def refuse_given(where: str, given: dict[str, Any], allowed: str) -> None:
    """Raises for every named argument that is not None, False or 0: attention here does not know it."""
    for name, value in given.items():
        if value is not None and not (isinstance(value, bool | int | float) and not value):
            raise Unsupported(f"{where} was given {name}, which it does not serve; {allowed}")
