"""How much a model computes: multiply-adds of its matrices and of its attention."""

from collections.abc import Callable

from torch import nn


def macs(model: nn.Module, rows: Callable[[str], int], width_pairs: int) -> int:
    """Multiply-adds of one forward pass. rows: how many rows pass through the linear layer of a name;
    width_pairs: visible (query, key) pairs times the width of all heads, summed over the layers: each costs a
    score and a weighted value.
    """
    linear = ((name, m) for name, m in model.named_modules() if isinstance(m, nn.Linear))
    return sum(rows(name) * m.in_features * m.out_features for name, m in linear) + 2 * width_pairs
