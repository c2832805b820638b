"""A Llama-style decoder over tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..kernels.fields import at_least_one
from ..kernels.layers import layered
from ..kernels.mask import Causal, Documents, Mask, Offsets, Window
from .block import Attend, Attends, Attention, Bias, SwiGLU, attend_of
from .rope import Rope


class Block(nn.Module):
    """Pre-norm attention and MLP with residuals."""

    def __init__(self, attention: Attention, mlp: SwiGLU, dim: int, eps: float) -> None:
        super().__init__()
        self.attention_norm, self.attention = nn.RMSNorm(dim, eps=eps), attention
        self.mlp_norm, self.mlp = nn.RMSNorm(dim, eps=eps), mlp

    def forward(self, x: Tensor, angles: tuple[Tensor, Tensor], attend: Attend, mask: Mask) -> Tensor:
        x = x + self.attention(self.attention_norm(x), angles, attend, mask)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class GPT(nn.Module):
    """Decoder of the Llama family: RMSNorm, RoPE, grouped queries, SwiGLU (Touvron et al. 2023; Llama team
    2024).

    vocab: None in a config takes the data's, so that here it must be a number. dim, layers, heads: as usual.
    kv_heads: None means heads. head_dim: None means dim // heads. hidden: width inside the MLP. mask: one for
    every layer, or one a layer. window: the nearest tokens, itself among them, beyond which a token sees none
    (Mistral: Jiang et al. 2023), for all layers or one a layer; None is all that the mask shows. bias: of
    which attention projections (Qwen2 has qkv). tied: the output layer is the embedding. predecessor: each
    token also sees the one before it through a learned mix, which the trainer takes before sharding. Nothing
    here knows of ranks.
    """

    def __init__(
        self, vocab: int | None, dim: int, layers: int, heads: int, hidden: int, *,
        kv_heads: int | None = None, head_dim: int | None = None, rope: Rope | None = None,
        mask: Mask | Sequence[Mask] | None = None, window: int | Sequence[int | None] | None = None,
        tied: bool = True, qk_norm: bool = False, bias: Bias = "none", predecessor: bool = False,
        eps: float = 1e-5, init_std: float = 0.02,
    ) -> None:  # fmt: skip
        super().__init__()
        if vocab is None:
            raise ValueError("model.vocab is null; give the number of token ids")
        kv_heads = heads if kv_heads is None else kv_heads
        sizes = {"vocab": vocab, "dim": dim, "layers": layers, "hidden": hidden}
        at_least_one("model.", **sizes, heads=heads, kv_heads=kv_heads)
        if heads % kv_heads:
            raise ValueError(
                f"model.heads is {heads}, model.kv_heads {kv_heads}: heads must be a multiple of kv_heads"
            )
        if head_dim is None and dim % heads:
            raise ValueError(
                f"model.dim is {dim}, model.heads {heads}: set model.head_dim, or a dim that heads divides"
            )
        head_dim = dim // heads if head_dim is None else head_dim
        if head_dim < 2 or head_dim % 2:
            raise ValueError(
                f"the head dim is {head_dim}; RoPE turns pairs, so it must be even (model.head_dim)"
            )
        masks = layered(Causal() if mask is None else mask, layers, kv_heads)
        self.windows = _windows(window, layers)
        self.masks = tuple(_near(*both) for both in zip(masks, self.windows, strict=True))
        self.rope, self.bias, self.eps = rope or Rope(), bias, eps
        self.layers, self.heads, self.kv_heads, self.head_dim = layers, heads, kv_heads, head_dim
        self.embed = nn.Embedding(vocab, dim)
        self.mix = nn.Linear(dim, dim, bias=False) if predecessor else None
        self.blocks = nn.ModuleList(
            Block(
                Attention(
                    dim, heads=heads, kv_heads=kv_heads, head_dim=head_dim, qk_norm=qk_norm, eps=eps,
                    bias=bias,
                ),
                SwiGLU(dim, hidden), dim, eps,
            )
            for _ in range(layers)
        )  # fmt: skip
        self.norm = nn.RMSNorm(dim, eps=eps)
        self.head = nn.Linear(dim, vocab, bias=False)
        if tied:
            self.head.weight = self.embed.weight
        self.reset(init_std)

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Normal weights of `std`, those that write to the residual stream divided by sqrt(2 layers)
        (GPT-2); biases are 0.
        """
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                narrow = name.endswith(("attention.o.weight", "mlp.down.weight"))
                nn.init.normal_(p, std=std / (2 * self.layers) ** 0.5 if narrow else std)
        if self.mix is not None:
            nn.init.normal_(self.mix.weight, std=self.mix.in_features**-0.5)

    def forward(
        self, tokens: Tensor, positions: Tensor, attend: Attends, *, offsets: Offsets | None = None,
        previous: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """tokens int64 [B, T] held here at global `positions` int64 [T] -> hidden states [B, T, dim] for
        `head`.

        attend: one for all layers, or several that take turns. offsets: starts of packed documents in the
        whole sequence (see `Documents`). previous: the token before each one in its document, -1 for none;
        needed with predecessor=True.
        """
        x = self.embed(tokens)
        if self.mix is not None:
            if previous is None:
                raise ValueError("model.predecessor=true needs the previous tokens")
            before = self.embed(previous.clamp_min(0)) * (previous >= 0)[..., None]
            x = x + self.mix(before)
        angles = self.rope.angles(positions, self.head_dim)
        for layer, (block, mask) in enumerate(zip(self.blocks, self.masks, strict=True)):
            here = attend_of(attend, layer)
            seen = mask if offsets is None else Documents(offsets, inner=mask)
            x = block(x, angles, here, seen)
        y: Tensor = self.norm(x)
        return y


def _windows(window: int | Sequence[int | None] | None, layers: int) -> tuple[int | None, ...]:
    """The window of each layer. ValueError if there are others than `layers`, or one below 1."""
    found = (window,) * layers if window is None or isinstance(window, int) else tuple(window)
    if len(found) != layers or any(w is not None and w < 1 for w in found):
        raise ValueError(
            f"model.window is {window}; it must be at least 1, for all {layers} layers or one a layer"
        )
    return found


def _near(mask: Mask, window: int | None) -> Mask:
    """What the mask shows within the window."""
    if window is None:
        return mask
    near = Window(window - 1, 0)
    return near if mask == Causal() else mask & near
