"""Results kept by bytes: no more than the limit, except the last few, and each made once."""

from concurrent.futures import ThreadPoolExecutor
from threading import Barrier
from typing import NamedTuple

import torch
from torch import Tensor

from longspan.kernels import lower, steps, tile
from longspan.kernels.kept import Kept, kept, size


class Pair(NamedTuple):
    a: Tensor
    b: Tensor


def test_what_is_kept_is_bounded_by_bytes() -> None:
    made: list[int] = []

    @kept(1000, least=2)
    def numbers(n: int, *, times: int = 1) -> Tensor:
        made.append(n)
        return torch.zeros(n, dtype=torch.uint8)

    assert numbers.__name__ == "numbers"
    for n in (400, 401, 400):
        numbers(n)
    assert made == [400, 401] and numbers.held == 801
    # 401 was used longest ago
    numbers(300)
    assert numbers.held == 700 and numbers(400) is numbers(400) and made == [400, 401, 300]
    # the last two stay, however large
    numbers(5000), numbers(6000)
    assert numbers.held == 11000 and numbers(5000).numel() == 5000 and made[3:] == [5000, 6000]
    numbers(1)
    assert numbers.held == 5001
    assert numbers(1, times=2) is not numbers(1)


def test_results_without_bytes_are_counted() -> None:
    numbers = Kept(lambda n: n, 1000, 2)
    for n in range(1000):
        numbers(n)
    assert len(numbers.found) == numbers.most


def test_memory_that_is_shared_counts_once() -> None:
    x = torch.zeros(100)
    assert size((x, Pair(x[:10], x.view(10, 10)), ("and", (x.clone(), 3)), None)) == 800


def test_everything_that_grows_with_the_tokens_is_kept_so() -> None:
    assert all(isinstance(x, Kept) and x.limit == 2**28 for x in (lower.lower, tile.tiles, steps._kept))


def test_threads_share_what_is_kept() -> None:
    together = Barrier(4, timeout=20)

    def make(n: int) -> Tensor:
        # all four are in here before one of them has kept anything
        together.wait()
        return torch.zeros(n)

    numbers = Kept(make, 2**20, 2)
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(numbers, [5] * 4))
    assert all(x is found[0] for x in found) and numbers.held == 20 and len(numbers.found) == 1
