"""How fast training goes: tokens per second, MFU, memory and time left, from the steps' own timing."""

import re
import resource
import sys
import time
from collections import deque
from collections.abc import Callable

import torch
from torch import nn

WINDOW = 20

# Published dense peaks in TFLOP/s: bf16 (and fp16, with float32 accumulation), TF32, float32.
# The first pattern that is found in the device's name counts. Sources: NVIDIA's data sheets of each card.
PEAKS: tuple[tuple[str, tuple[float, float, float]], ...] = (
    (r"\bGB200\b", (2500.0, 1250.0, 80.0)),
    (r"\bB[23]00\b", (2250.0, 1125.0, 75.0)),
    (r"\bH200 NVL\b", (835.5, 417.5, 60.0)),
    (r"\bG?H200\b", (989.5, 494.7, 67.0)),
    (r"\bH100 NVL\b", (835.5, 417.5, 60.0)),
    (r"\bH100 PCIe\b", (756.0, 378.0, 51.0)),
    (r"\bH[18]00\b", (989.5, 494.7, 67.0)),
    (r"\bH20\b", (148.0, 74.0, 44.0)),
    (r"\bA[18]00\b", (312.0, 156.0, 19.5)),
    (r"\bL40S\b", (362.0, 183.0, 91.6)),
    (r"\bL40\b", (181.0, 90.5, 90.5)),
    (r"\bL4\b", (121.0, 60.0, 30.3)),
    (r"\bRTX 6000 Ada\b", (364.2, 182.1, 91.1)),
    (r"\bRTX A6000\b", (154.8, 77.4, 38.7)),
    (r"\bA40\b", (149.7, 74.8, 37.4)),
    (r"\bA30\b", (165.0, 82.0, 10.3)),
    (r"\bA10\b", (125.0, 62.5, 31.2)),
    (r"\bRTX 5090\b", (209.5, 104.8, 104.8)),
    (r"\bRTX 4090\b", (165.2, 82.6, 82.6)),
    (r"\bRTX 3090\b", (71.0, 35.6, 35.6)),
)


class Meter:
    """Step timing over a sliding window of the last 20 steps, which the first, warm-up, step never enters.

    peak_flops: FLOP/s of one rank's device; ranks: how many there are; steps: the last step of the run;
    start_step: steps done before this start (0, or the step that was resumed); clock: seconds, for tests.
    """

    def __init__(
        self,
        *,
        peak_flops: float,
        ranks: int,
        steps: int,
        start_step: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if peak_flops <= 0 or ranks < 1:
            raise ValueError(f"peak_flops={peak_flops} and ranks={ranks} must be positive")
        self._peak = peak_flops * ranks
        self._steps = steps
        self._start = start_step
        self._clock = clock
        self._window: deque[tuple[float, int, float]] = deque(maxlen=WINDOW)
        self._since = clock()

    def update(self, step: int, tokens: int, flops: float) -> dict[str, float]:
        """Ends a step of `tokens` tokens and `flops` FLOP, both over all ranks, forward and backward.

        Gives tokens_per_s, mfu (0..1), step_s and eta_s over the window (at the first step, of that step) and
        peak_memory in bytes: of the CUDA device if one is in use, else of the process.
        """
        now = self._clock()
        sample = (max(now - self._since, 1e-9), tokens, flops)
        self._since = now
        if step > self._start + 1:
            self._window.append(sample)
        seconds, done, work = (sum(column) for column in zip(*(self._window or [sample]), strict=True))
        step_s = seconds / max(len(self._window), 1)
        return {
            "tokens_per_s": done / seconds,
            "mfu": work / seconds / self._peak,
            "step_s": step_s,
            "peak_memory": float(peak_memory()),
            "eta_s": max(self._steps - step, 0) * step_s,
        }

    def restart(self) -> None:
        """Starts the next step's time now: call it after work that is no step, such as a save."""
        self._since = self._clock()


def peak_memory() -> int:
    """Bytes: the most that tensors took on the CUDA device if one is in use, else that this process took."""
    if torch.cuda.is_initialized():
        return int(torch.cuda.max_memory_allocated())
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def gpt_flops(
    parameters_without_embedding: int, tokens: int, layers: int, heads: int, head_dim: int, visible_pairs: int
) -> float:
    """FLOP of a step: 6 per parameter and token, and 12 · head_dim per layer, head and visible pair.

    heads are query heads; visible_pairs counts the (query, key) pairs the mask lets through over the whole
    batch, so a sparse mask earns nothing for what it skips. The usual MFU convention (PaLM, appendix B): the
    backward pass counts twice the forward one, recomputation not at all.
    """
    return 6.0 * parameters_without_embedding * tokens + 12.0 * layers * heads * head_dim * visible_pairs


def parameter_counts(model: nn.Module) -> tuple[int, int]:
    """All parameters, and those that are no embedding table."""
    total = sum(elements(p) for p in model.parameters())
    tables = {id(m.weight): elements(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    return total, total - sum(tables.values())


def elements(p: torch.Tensor) -> int:
    """Of the whole parameter, also where an engine has left only a part of it, or nothing, in its place."""
    return int(getattr(p, "ds_numel", getattr(p, "whole_numel", p.numel())))


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str]:
    """Dense peak of `device` in FLOP/s for matrices of `dtype`, and where the figure is from.

    Known cards: the published figure, for float32 that of TF32 if torch may use it. The CPU, parts of a card
    (MIG) and unknown cards: a matmul that is timed here, within about 0.3 s.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        known = published_peak(name, dtype, torch.get_float32_matmul_precision() != "highest")
        if known is not None:
            return known
    return _measured_peak(device, dtype), "measured matmul peak on this machine"


def published_peak(name: str, dtype: torch.dtype, tf32: bool) -> tuple[float, str] | None:
    """The published dense peak of the card that calls itself `name`, or None if there is none for it."""
    column = {torch.bfloat16: 0, torch.float16: 0, torch.float32: 1 if tf32 else 2}.get(dtype)
    if column is None or "MIG" in name:
        return None
    for pattern, peaks in PEAKS:
        if re.search(pattern, name):
            kind = ("bf16", "tf32", "fp32")[column]
            return peaks[column] * 1e12, f"{name}, published dense {kind} peak"
    return None


def _measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """The best of growing square matmuls, in FLOP/s."""
    best = 0.0
    end = time.perf_counter() + 0.2
    size = 128
    # A matmul of twice the size takes up to eight times as long: never start one that would overrun.
    last = 0.0
    while time.perf_counter() + last < end:
        a = torch.ones(size, size, device=device, dtype=dtype)
        for _ in range(2):
            last = _seconds(a, device)
            best = max(best, 2.0 * size**3 / last)
        if size < 4096 and time.perf_counter() + 24 * last < end:
            size *= 2
    return best


def _seconds(a: torch.Tensor, device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    torch.mm(a, a)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return max(time.perf_counter() - start, 1e-9)
