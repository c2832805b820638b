"""What all tests share: the environment that Triton wants, and worlds of ranks that outlive a test."""

import os
from collections.abc import Iterator

# Triton 3.9 warns, and warnings are errors here, when this is unset at a compilation.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest

from world import World, Worlds


@pytest.fixture(scope="session")
def world() -> Iterator[Worlds]:
    """`world(4)(fn, *args)` runs `fn(rank, *args)` on four ranks, started when the session first asks."""
    pools: dict[int, World] = {}
    yield lambda size: pools.setdefault(size, World(size))
    for pool in pools.values():
        pool.close()
