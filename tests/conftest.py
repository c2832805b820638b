"""What all tests share: the environment that Triton wants, and worlds of ranks that outlive a test."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

# Triton 3.9 warns, and warnings are errors here, when this is unset at a compilation.
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")

import pytest

from world import World, Worlds

if TYPE_CHECKING:
    from jobs import Once


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that share worlds of ranks are told apart: those worlds fill a machine by themselves."""
    for item in items:
        if {"world", "once"} & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.ranks)


@pytest.fixture(scope="session")
def world() -> Iterator[Worlds]:
    """`world(4)(fn, *args)` runs `fn(rank, *args)` on four ranks, started when the session first asks."""
    pools: dict[int, World] = {}
    yield lambda size: pools.setdefault(size, World(size))
    for pool in pools.values():
        pool.close()


@pytest.fixture(scope="session")
def data_cache(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The word that keeps the data's cache in one place for all tests."""
    return f"data.cache={tmp_path_factory.mktemp('cache')}"


@pytest.fixture(scope="session")
def once(world: Worlds, data_cache: str, tmp_path_factory: pytest.TempPathFactory) -> "Once":
    """`once(4, "parallel=ring")` is the run of that config on four ranks, by rank, never done twice."""
    from jobs import Ran, config, run

    done: dict[tuple[int, tuple[str, ...]], list[Ran]] = {}

    def ran(size: int, *overrides: str) -> list[Ran]:
        if (size, overrides) not in done:
            folder = tmp_path_factory.mktemp("run") / "checkpoints"
            done[size, overrides] = world(size)(run, config(data_cache, *overrides), folder)
        return done[size, overrides]

    return ran
