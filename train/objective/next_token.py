"""Next-token prediction: the loss of a decoder, weighted by token over all ranks."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ...kernels.loss import likeliest, linear_cross_entropy, token_losses
from ...kernels.mask import Documents, Mask
from ...kernels.tile import pairs
from ...models.block import Attends
from ...models.gpt import GPT
from ...parallel.layout import Layout
from ...parallel.placement import Placement
from ..batch import Shard, Tokens, collate
from ..data.sample import Dataset
from ..engine.tensor_parallel import held
from ..judge import Judge
from ..judge_text import TextJudge
from ..meter import gpt_flops, parameter_counts


class NextToken(nn.Module):
    """Cross entropy against labels that were taken before sharding; computed `chunk` tokens at a time."""

    def __init__(self, model: GPT, *, chunk: int = 4096, z_loss: float = 0.0) -> None:
        super().__init__()
        if chunk < 1 or z_loss < 0:
            raise ValueError(f"objective.chunk is {chunk}, z_loss {z_loss}; chunk >= 1 and z_loss >= 0")
        self.model, self.chunk, self.z_loss = model, chunk, z_loss

    def load(self, data: Dataset, wanted: list[int], step: int) -> Tokens:
        """See `Objective`."""
        return collate([data.sample(i, step) for i in wanted])

    def context(self, data: Dataset) -> int:
        return data.context

    def placement(self, data: Dataset, layout: Layout, mask: Mask) -> Placement:
        several = data.describe().get("pack") is not None  # packed documents, or one and its padding
        return layout.place(data.context, Documents((0, 1) if several else (0,), inner=mask))

    def flops(self, batches: Sequence[Tokens]) -> float:
        model, visible = self.model, 0
        for mask in set(model.masks):
            seen = sum(pairs(b.mask(mask), b.length, model.kv_heads) for b in batches)
            visible += seen * model.masks.count(mask) // len(model.masks)
        _, rest = parameter_counts(model)
        if model.head.weight is model.embed.weight:
            rest += model.head.weight.numel()  # the tied table works as the output layer
        tokens = sum(b.rows * b.length for b in batches)
        return gpt_flops(rest, tokens, model.layers, model.heads, model.head_dim, visible)

    def judge(self) -> Judge:
        return TextJudge()

    def hidden(self, part: Shard, attend: Attends) -> Tensor:
        x: Tensor = self.model(
            part.tokens, part.positions, attend, offsets=part.offsets, previous=part.previous
        )
        return x.flatten(0, 1)

    def forward(self, part: Shard, attend: Attends, denominator: float) -> Tensor:
        """This rank's share of the mean: its summed loss, nats, over the *global* number of valid tokens."""
        x, (weight, rows) = self.hidden(part, attend), held(self.model.head.weight)
        return linear_cross_entropy(
            x,
            weight,
            part.labels.flatten(),
            denominator=denominator,
            chunk=self.chunk,
            z_loss=self.z_loss,
            rows=rows,
        )

    @torch.no_grad()
    def losses(self, part: Shard, attend: Attends) -> Tensor:
        """Nats of each token, float32 [B, N], 0 where the label is ignored."""
        x, (weight, rows) = self.hidden(part, attend), held(self.model.head.weight)
        flat = token_losses(x, weight, part.labels.flatten(), chunk=self.chunk, rows=rows)
        return flat.view_as(part.labels)

    @torch.no_grad()
    def guesses(self, part: Shard, attend: Attends, asked: Tensor) -> Tensor:
        """The most likely next token where `asked`, bool [B, N], is true: int64 [asked tokens]."""
        x, (weight, rows) = self.hidden(part, attend), held(self.model.head.weight)
        return likeliest(x[asked.flatten()], weight, rows=rows)
