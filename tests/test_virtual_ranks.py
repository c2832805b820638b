"""The benchmark of virtual ranks runs, and counts the work of every rank."""

import pytest
import torch

from benchmarks import virtual_ranks
from benchmarks.virtual_ranks import MASKS, Times, by_rank, made
from longspan.kernels.span import Spans
from longspan.parallel.placement import contiguous

CPU = torch.device("cpu")


def test_virtual_ranks_are_timed_on_a_cpu_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--tokens", "512", "--ranks", "4", "--heads", "2,1,16", "--rounds", "1"]
    ratio = virtual_ranks.main(words)
    assert ratio.forward > 0 and ratio.backward > 0
    told = capsys.readouterr().out
    assert "causal, 512 tokens, heads 2,1,16, zigzag over 4 ranks" in told and "of one device" in told


def test_each_rank_works_on_the_shards_that_it_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    def area(given: object, mask: object, at_q: Spans, at_k: Spans, rounds: int) -> Times:
        return Times(at_q[0].length * at_k[0].length, 1.0)

    monkeypatch.setattr(virtual_ranks, "kernels", area)
    given = made(MASKS["causal"], 60, (2, 1, 16), CPU)
    ranks = by_rank(given, MASKS["causal"], contiguous(60, 3), 1)
    with pytest.raises(TimeoutError, match="no time for more than 0 ranks"):
        by_rank(given, MASKS["causal"], contiguous(60, 3), 1, deadline=0.0)
    assert ranks == [Times(400.0, 1.0), Times(800.0, 2.0), Times(1200.0, 3.0)]
