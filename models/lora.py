"""LoRA: attention's projections stay as they are and learn a difference of low rank."""

from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .block import Attention

PROJECTIONS = ("q", "k", "v", "o")


class LoraLinear(nn.Linear):
    """x W' + alpha / rank · x A' B' (Hu et al. 2022, section 4.1), with `a` [rank, in] and `b` [out, rank].

    The weight and its bias keep their names, and do not learn. b starts at zero, so that at first nothing
    differs.
    """

    def __init__(self, plain: nn.Linear, rank: int, alpha: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = plain.in_features, plain.out_features
        self.weight, self.bias = plain.weight, plain.bias
        self.scale = alpha / rank
        self.a = nn.Parameter(self.weight.new_empty(rank, self.in_features))
        self.b = nn.Parameter(self.weight.new_zeros(self.out_features, rank))
        self.drawn(self.a)

    @staticmethod
    def drawn(a: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Fills `a`, or what stands for it, with first values."""
        return nn.init.kaiming_uniform_(a, a=5**0.5, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + F.linear(F.linear(x, self.a), self.b) * self.scale

    @torch.no_grad()
    def merged(self) -> Tensor:
        """The one weight that does the same, summed in float32 at least, in the weight's dtype."""
        dtype = torch.promote_types(self.weight.dtype, torch.float32)
        found = self.weight.to(dtype) + self.scale * (self.b.to(dtype) @ self.a.to(dtype))
        return found.to(self.weight.dtype)


@dataclass(frozen=True)
class Lora:
    """What learns when a model is adapted: differences of `rank` on every attention projection (0: none, and
    then all weights learn), scaled by alpha / rank; besides them norms and the embedding, which LongLoRA
    found to matter for longer contexts (Chen et al. 2024, section 3.3). A tied output layer is the embedding.
    """

    rank: int = 0
    alpha: float = 16.0
    norms: bool = True
    embedding: bool = True

    def __post_init__(self) -> None:
        if self.rank < 0 or self.alpha <= 0:
            raise ValueError(
                f"lora.rank is {self.rank}, lora.alpha {self.alpha}; they need rank >= 0, alpha > 0"
            )

    def apply(self, model: nn.Module) -> None:
        """Adapts the model in place; names of its weights stay. ValueError if it has no attention that can be
        adapted.
        """
        if not self.rank:
            return
        found = [module for module in model.modules() if isinstance(module, Attention)]
        if not found:
            raise ValueError(
                f"lora.rank is {self.rank}; it serves the attention of GPT, and {type(model).__name__} has "
                f"none"
            )
        for p in model.parameters():
            p.requires_grad_(False)
        for attention in found:
            for name in PROJECTIONS:
                plain = cast(nn.Linear, getattr(attention, name))
                setattr(attention, name, LoraLinear(plain, self.rank, self.alpha))
        for module in model.modules():
            if (self.norms and isinstance(module, nn.RMSNorm)) or (
                self.embedding and isinstance(module, nn.Embedding)
            ):
                module.requires_grad_(True)


def own_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights by name that the model has when it is not adapted. Tied ones are there once."""
    added = {id(p) for m in model.modules() if isinstance(m, LoraLinear) for p in (m.a, m.b)}
    return {name: p for name, p in model.named_parameters() if id(p) not in added}


def merged_weights(model: nn.Module) -> dict[str, Tensor]:
    """The model's weights by name as if it had never been adapted, with what it learned."""
    adapters = {f"{name}.weight": m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
    weights = own_weights(model)
    return {name: adapters[name].merged() if name in adapters else p.detach() for name, p in weights.items()}
