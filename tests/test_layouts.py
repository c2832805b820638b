"""What a mesh and a placement take, and what they refuse."""

import pytest
import torch

from longspan.parallel.layout import shard
from longspan.parallel.mesh import Mesh
from longspan.parallel.placement import contiguous
from longspan.parallel.single import Single


@pytest.mark.parametrize(
    ("mesh", "world_size", "said"),
    [
        (Mesh(dp=1, ring=3), 4, "start 3"),
        (Mesh(ring=3), 4, "multiple of 3"),
        (Mesh(ring=8), 4, "multiple of 8"),
    ],
)
def test_a_world_that_does_not_fit_says_what_would(mesh: Mesh, world_size: int, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        mesh.degrees(world_size)


def test_auto_takes_what_is_left() -> None:
    assert Mesh(ring="auto").degrees(6) == {"dp": 1, "ring": 6, "head": 1, "tp": 1}
    assert Mesh(ring=2).degrees(6) == {"dp": 3, "ring": 2, "head": 1, "tp": 1}
    assert Mesh(ring="auto", head="auto").degrees(16, node=4) == {"dp": 1, "ring": 4, "head": 4, "tp": 1}


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="parallel.mesh.ring is 0"):
        Mesh(ring=0)
    with pytest.raises(ValueError, match="has 5 tokens, but the placement is for 4"):
        shard(Single(), torch.zeros(1, 5), contiguous(4, 1), 1)
