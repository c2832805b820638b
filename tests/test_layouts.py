"""What cutting by a placement refuses."""

import pytest
import torch

from longspan.parallel.layout import shard
from longspan.parallel.placement import contiguous
from longspan.parallel.single import Single


def test_bad_input_is_refused() -> None:
    with pytest.raises(ValueError, match="has 5 tokens, but the placement is for 4"):
        shard(Single(), torch.zeros(1, 5), contiguous(4, 1), 1)
