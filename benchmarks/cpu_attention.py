"""Forward and backward of the cpu backend beside torch's SDPA and the reference, in one run.

python -m benchmarks.cpu_attention [--threads 2] [--repeats 5] [--case train]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from longspan.kernels.attention import attention
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Causal, Documents, Full, Mask, Window
from longspan.kernels.span import Span


@dataclass(frozen=True)
class Case:
    name: str
    mask: Mask
    tokens: int
    heads: int
    head_dim: int
    dtype: torch.dtype = torch.float32


def cases() -> list[Case]:
    packed = Documents(tuple(range(0, 2048, 600)), Causal())
    train = [
        Case(f"train {name} {heads}x{dim}", mask, 2048, heads, dim)
        for heads, dim in ((4, 16), (2, 32))
        for name, mask in (
            ("causal", Causal()),
            ("full", Full()),
            ("packed", packed),
            ("window", Window(512)),
        )
    ]
    return [
        *train,
        Case("causal 8x64", Causal(), 4096, 8, 64),
        Case("causal 8x64 bf16", Causal(), 4096, 8, 64, torch.bfloat16),
        Case("window 8x64", Window(1024), 4096, 8, 64),
    ]


def runners(case: Case) -> dict[str, Callable[[], Tensor]]:
    """Forward passes, by name, over the same leaves."""
    shape = 1, case.tokens, case.heads, case.head_dim
    q, k, v = (torch.randn(shape, dtype=case.dtype, requires_grad=True) for _ in range(3))
    at = (Span(0, case.tokens),)
    plain = isinstance(case.mask, Full | Causal)
    seen = None
    if not plain:
        seen = visible(lower(case.mask, at, at, case.heads, q.device))[0, 0]

    def ours() -> Tensor:
        return attention(q, k, v, case.mask, at, at, backend="cpu")[0]

    def sdpa() -> Tensor:
        qh, kh, vh = (x.transpose(1, 2) for x in (q, k, v))
        causal = isinstance(case.mask, Causal)
        return F.scaled_dot_product_attention(qh, kh, vh, attn_mask=seen, is_causal=causal)

    def reference() -> Tensor:
        return attention(q, k, v, case.mask, at, at, backend="reference")[0]

    return {"cpu": ours, "sdpa": sdpa, "reference": reference}


def once(run: Callable[[], Tensor]) -> tuple[float, float]:
    """Forward and backward time in ms."""
    start = time.perf_counter()
    out = run()
    middle = time.perf_counter()
    out.backward(torch.ones_like(out))
    return 1e3 * (middle - start), 1e3 * (time.perf_counter() - middle)


def measure(case: Case, repeats: int) -> dict[str, tuple[float, float]]:
    """Least forward and backward time of each; in turns, so that a busy machine slows all of them alike."""
    runs = runners(case)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
    for i in range(repeats + 1):
        for name, run in runs.items():
            if name != "reference" or i < 2:
                times[name].append(once(run))
    # the first pass only warms up
    return {name: (min(f for f, _ in x[1:]), min(b for _, b in x[1:])) for name, x in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5, help="the fastest counts; the reference runs once")
    parser.add_argument("--case", default="", help="only cases whose name contains this")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    print("ms of the cpu backend, and how many times faster it is, forward and backward together")
    print(f"{'case':<22}{'forward':>9}{'backward':>10}{'over sdpa':>11}{'over reference':>16}")
    for case in cases():
        if args.case not in case.name:
            continue
        times = measure(case, args.repeats)
        forward, backward = times["cpu"]
        sdpa, reference = (sum(times[x]) / (forward + backward) for x in ("sdpa", "reference"))
        print(f"{case.name:<22}{forward:>9.1f}{backward:>10.1f}{sdpa:>11.2f}{reference:>16.1f}", flush=True)


if __name__ == "__main__":
    main()
