"""How fast matrices and attention go on the device that is here, and how long a way's own attention takes."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch

from ..kernels.attention import attention
from ..kernels.mask import Causal, Mask
from ..kernels.span import Span, Spans
from ..kernels.tile import needed
from ..parallel.balance import ESTIMATE
from ..parallel.placement import contiguous, named
from .plan_hardware import Rates
from .plan_job import Shape

ROUNDS = 3


def calibrated(job: Shape, ranks: int) -> Rates:
    """On the CUDA device, or on a CPU whose cores `ranks` ranks share. Takes seconds."""
    cuda, dtype = torch.cuda.is_available(), getattr(torch, job.precision)
    with _as_one_of(ranks) as (device, share):
        size = 8192 if cuda else 512
        a = torch.ones(size, size, device=device, dtype=dtype)
        matmul = 2 * size**3 / _least(lambda: torch.mm(a, a), cuda)
        forward, backward, call = _attention(job, 16384 if cuda else 1024, device, dtype)
    cores = len(os.sched_getaffinity(0))
    name = torch.cuda.get_device_name() if cuda else f"a CPU of {cores} cores that {ranks} ranks share"
    return Rates(share * matmul, share * forward, share * backward, call / share, f"measured here: {name}")


@contextmanager
def _as_one_of(ranks: int) -> Iterator[tuple[torch.device, float]]:
    """The device, with the threads that one of so many ranks has, and the share of a core that it has."""
    if torch.cuda.is_available():
        yield torch.device("cuda"), 1.0
        return
    cores, before = len(os.sched_getaffinity(0)), torch.get_num_threads()
    torch.set_num_threads(max(1, cores // ranks))
    try:
        yield torch.device("cpu"), min(1.0, cores / ranks)
    finally:
        torch.set_num_threads(before)


@lru_cache(maxsize=256)
def attended(
    job: Shape, mask: Mask, ranks: int, *, heads: int, kv_heads: int, ring: int, placement: str, hops: bool
) -> tuple[float, float]:
    """Seconds forward and backward of one layer's attention of one sequence, on the busiest of `ring` ranks:
    its own queries and the shards of keys that they need, timed here. hops: a call for each such shard, else
    one for all.
    """
    cuda, dtype = torch.cuda.is_available(), getattr(torch, job.precision)
    where = named(placement)(job.tokens, ring, mask) if ring > 1 else contiguous(job.tokens, 1)
    works = where.work(mask, most=ESTIMATE)
    mine = where.spans_by_rank[max(range(ring), key=lambda rank: works[rank])]
    every = [theirs for theirs in where.spans_by_rank if needed(mask, mine, theirs, kv_heads)]
    if not hops:
        every = [tuple(s for spans in every for s in spans)]
    forward = backward = 0.0
    with _as_one_of(ranks) as (device, share):
        for theirs in every:
            ahead, back = _call(mask, mine, theirs, (heads, kv_heads, job.head_dim), device, dtype)
            forward, backward = forward + ahead / share, backward + back / share
        if cuda:
            torch.cuda.empty_cache()
    return forward, backward


def _call(
    mask: Mask,
    at_q: Spans,
    at_k: Spans,
    shape: tuple[int, int, int],
    device: torch.device,
    dtype: torch.dtype,
) -> tuple[float, float]:
    heads, kv_heads, head_dim = shape
    lengths = [sum(s.length for s in at) for at in (at_q, at_k, at_k)]
    shapes = [(1, n, h, head_dim) for n, h in zip(lengths, (heads, kv_heads, kv_heads), strict=True)]
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    out = attention(q, k, v, mask, at_q, at_k)[0]
    up, cuda = torch.ones_like(out), device.type == "cuda"
    back = _least(lambda: torch.autograd.grad(out, (q, k, v), up, retain_graph=True), cuda)
    with torch.no_grad():
        return _least(lambda: attention(q, k, v, mask, at_q, at_k), cuda), back


def _attention(
    job: Shape, tokens: int, device: torch.device, dtype: torch.dtype
) -> tuple[float, float, float]:
    """FLOP/s forward and backward, and the seconds of a call that has next to nothing to do."""
    groups = max(1, min(job.kv_heads, 8 * job.kv_heads // job.heads))
    heads = groups * job.heads // job.kv_heads

    def both(n: int) -> tuple[float, float]:
        shapes = [(1, n, h, job.head_dim) for h in (heads, groups, groups)]
        q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
        at = (Span(0, n),)

        def ahead() -> torch.Tensor:
            return attention(q, k, v, Causal(), at, at)[0]

        out = ahead()
        up = torch.ones_like(out)
        back = _least(
            lambda: torch.autograd.grad(out, (q, k, v), up, retain_graph=True), device.type == "cuda"
        )
        with torch.no_grad():
            return _least(ahead, device.type == "cuda"), back

    call = min(both(16))
    forward, backward = (max(1e-9, x - call) for x in both(tokens))
    work = 2 * job.head_dim * heads * tokens * (tokens + 1)
    return work / forward, 2.5 * work / backward, call


def _least(work: Callable[[], object], cuda: bool) -> float:
    """The fewest seconds of a few rounds, after one that warms up."""
    work()
    found = []
    for _ in range(ROUNDS):
        if cuda:
            torch.cuda.synchronize()
        began = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        found.append(time.perf_counter() - began)
    return min(found)
