"""What conditions a diffusion model: the time and the class as one vector, and what a block does with it."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sinusoid(t: Tensor, dim: int) -> Tensor:
    """t [...] -> [..., dim]: cosines, then sines, of t at wavelengths from 2 pi to 2 pi 10000 (Ho et al.
    2020, in the order of DiT and Wan). float32 for every t narrower than that.
    """
    half = dim // 2
    t = t.to(torch.promote_types(t.dtype, torch.float32))
    frequency = 10_000.0 ** (-torch.arange(half, device=t.device, dtype=t.dtype) / half)
    angle = t[..., None] * frequency
    return torch.cat((angle.cos(), angle.sin()), -1)


class TimeEmbedder(nn.Module):
    """A two-layer MLP over the sinusoids of `scale` * t."""

    def __init__(self, dim: int, freq_dim: int, scale: float) -> None:
        super().__init__()
        if freq_dim < 2 or freq_dim % 2:
            raise ValueError(f"model.freq_dim is {freq_dim}; it must be even, sines and cosines")
        self.freq_dim, self.scale = freq_dim, scale
        self.mlp = nn.Sequential(nn.Linear(freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        """t [...] -> [..., dim]."""
        weight: Tensor = self.mlp[0].weight  # type: ignore[assignment]
        y: Tensor = self.mlp(sinusoid(t * self.scale, self.freq_dim).to(weight.dtype))
        return y


class ClassEmbedder(nn.Module):
    """A vector for each of `classes`, and one more, the last, for no class (classifier-free guidance)."""

    def __init__(self, classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, dim)

    def forward(self, y: Tensor) -> Tensor:
        """y int64 [...] -> [..., dim]."""
        x: Tensor = self.embedding_table(y)
        return x


def per_token(x: Tensor) -> Tensor:
    """One time or class a sample, [B], as one for all its tokens, [B, 1]; one a token, [B, T], stays."""
    return x[:, None] if x.ndim == 1 else x


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x [B, T, dim], shift and scale [B, 1 or T, dim] (Peebles & Xie 2023, section 3.2)."""
    return x * (1 + scale) + shift


class Mlp(nn.Module):
    """fc2(gelu(fc1(x))), the GELU by tanh."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(dim, hidden), nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.fc2(F.gelu(self.fc1(x), approximate="tanh"))
        return y


class SequentialMlp(nn.Sequential):
    """`Mlp` with Wan's names of its layers, 0 and 2."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__(nn.Linear(dim, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, dim))


class Modulation(nn.Sequential):
    """`count` vectors from the condition, each [B, 1 or T, dim]; zero at first (adaLN-Zero)."""

    def __init__(self, dim: int, count: int) -> None:
        super().__init__(nn.SiLU(), nn.Linear(dim, count * dim))
        self.count = count

    def of(self, condition: Tensor) -> Sequence[Tensor]:
        return self(condition).chunk(self.count, -1)


class FinalLayer(nn.Module):
    """A modulated norm and the output patches, both zero at first."""

    def __init__(self, dim: int, out: int) -> None:
        super().__init__()
        self.norm_final = plain_norm(dim)
        self.linear = nn.Linear(dim, out)
        self.adaLN_modulation = Modulation(dim, 2)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation.of(condition)
        y: Tensor = self.linear(modulate(self.norm_final(x), shift, scale))
        return y


def plain_norm(dim: int) -> nn.LayerNorm:
    """A LayerNorm without weights, as before every modulation."""
    return nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


class PatchEmbed(nn.Module):
    """Patch tokens to width `dim`. Also loads the weights [dim, C, *patch] of a convolution over pixels,
    whose channel is its slowest axis and ours the fastest (see `patchify`).
    """

    def __init__(self, patch_dim: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Linear(patch_dim, dim)
        self.register_load_state_dict_pre_hook(_flatten)

    def forward(self, x: Tensor) -> Tensor:
        # float32 data meets weights that were gathered in 16 bits
        y: Tensor = self.proj(x.to(self.proj.weight.dtype))
        return y


def _flatten(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: object) -> None:
    weight = state.get(f"{prefix}proj.weight")
    if weight is not None and weight.ndim > 2:
        state[f"{prefix}proj.weight"] = weight.movedim(1, -1).flatten(1)


@torch.no_grad()
def reset(model: nn.Module, class_std: float = 0.02) -> None:
    """Initial weights of DiT (Peebles & Xie 2023, section 3.2, and their code): Xavier-uniform matrices,
    normal 0.02 in the embedding of the time, normal `class_std` in that of the class, zero in modulations and
    in the last layer.
    """
    for name, part in model.named_modules():
        if isinstance(part, nn.Linear):
            zero = "adaLN_modulation" in name or name == "final_layer.linear"
            if zero:
                nn.init.zeros_(part.weight)
            elif "t_embedder" in name:
                nn.init.normal_(part.weight, std=0.02)
            else:
                nn.init.xavier_uniform_(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        elif isinstance(part, nn.Embedding):
            nn.init.normal_(part.weight, std=class_std)
