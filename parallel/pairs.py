"""Keys and values side by side with the tokens first, so that any run of tokens is one piece of memory."""

import torch
from torch import Tensor


def tokens_first(k: Tensor, v: Tensor) -> Tensor:
    """[B, N, H, D] twice -> [N, 2, B, H, D]: a copy, whose tokens can be sent, received and put in order as
    they are.
    """
    return torch.stack((k.transpose(0, 1), v.transpose(0, 1)), 1)


def as_pair(kv: Tensor) -> tuple[Tensor, Tensor]:
    """The views [B, N, H, D] of both."""
    return kv[:, 0].transpose(0, 1), kv[:, 1].transpose(0, 1)
