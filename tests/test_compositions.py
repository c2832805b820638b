"""Random compositions of all masks: the reference equals a loop in plain Python, cpu the reference."""

from functools import partial

import pytest
import torch

from compositions import COUNT, composition
from longspan.kernels.attention import DEFAULT
from oracle import check_against_reference, distance, door, gradients, inputs, plain, sizes
from patterns import truth


@pytest.mark.parametrize("seed", range(COUNT))
def test_the_reference_equals_a_loop(seed: int) -> None:
    """out, lse and the gradients through both, in float64; autograd takes them from plain attention."""
    case = composition(seed)
    seen = truth(case.mask, *case.at, case.heads[1]).repeat_interleave(case.heads[0] // case.heads[1], 1)
    given = inputs(*sizes(case.at), case.heads, batch=case.batch, dim=5, seed=seed)
    ours, right = door(case.mask, case.at, "reference"), partial(plain, seen=seen, options=DEFAULT)
    for found, wanted in zip(ours(*given[:3]), right(*given[:3]), strict=True):
        assert found is not None
        assert torch.equal(found.isinf(), wanted.isinf().expand_as(found))
        assert distance(*(x.masked_fill(found.isinf(), 0.0) for x in (found, wanted))) < 1e-10
    if not seen.any():
        assert not any(x.any() for x in gradients(ours, given))
        return
    for found, wanted in zip(gradients(ours, given), gradients(right, given), strict=True):
        assert distance(found, wanted) < 1e-10


@pytest.mark.parametrize("seed", range(COUNT))
def test_cpu_equals_the_reference(seed: int) -> None:
    case = composition(seed)
    given = inputs(*sizes(case.at), case.heads, batch=case.batch, dim=7, dtype=torch.float32, seed=seed)
    check_against_reference(case.mask, case.at, given)
