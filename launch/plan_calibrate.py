"""How fast matrices and attention go on the device that is here."""

import os
import time
from collections.abc import Callable

import torch

from ..kernels.attention import attention
from ..kernels.mask import Causal
from ..kernels.span import Span
from .plan_hardware import Rates
from .plan_job import Shape

ROUNDS = 3


def calibrated(job: Shape, ranks: int) -> Rates:
    """On the CUDA device, or on a CPU whose cores `ranks` ranks share. Takes seconds."""
    cuda = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if cuda else "cpu"), getattr(torch, job.precision)
    cores = len(os.sched_getaffinity(0))
    before, share = torch.get_num_threads(), 1.0
    if not cuda:
        torch.set_num_threads(max(1, cores // ranks))
        share = min(1.0, cores / ranks)
    try:
        size = 8192 if cuda else 512
        a = torch.ones(size, size, device=device, dtype=dtype)
        matmul = 2 * size**3 / _least(lambda: torch.mm(a, a), cuda)
        forward, backward, call = _attention(job, 16384 if cuda else 1024, device, dtype)
    finally:
        torch.set_num_threads(before)
    name = torch.cuda.get_device_name() if cuda else f"a CPU of {cores} cores that {ranks} ranks share"
    return Rates(share * matmul, share * forward, share * backward, call / share, f"measured here: {name}")


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
