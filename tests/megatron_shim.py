"""megatron-core's DistributedDataParallel, distributed optimizer and dist_checkpointing on CPU tensors: for
tests, and only in a process of their own (megatron_child.py), since it changes torch for all that runs there.

What is replaced, because megatron-core 0.16 takes for granted that a CUDA device is there:

- `device="cuda"` in any call of torch becomes the CPU: flags, the unit scale, sums of norms;
- `torch.cuda.current_device()` is "cpu": the flat buffers are made there; `torch.cuda.synchronize()` does
  nothing;
- `x.type()` says "torch.cuda.FloatTensor" for "torch.FloatTensor", by which its optimizer knows parameters
  and gradients; `x.cuda()` is x;
- `longspan.train.engine.megatron.needs_cuda`, by which engine.optimizer=distributed is refused on a CPU.

Nothing computes anything here: every number comes from megatron-core, torch and Longspan as they are.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode

from longspan.train.engine import megatron


class _NoCuda(TorchFunctionMode):
    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if str(kwargs.get("device")).startswith("cuda"):
            kwargs["device"] = "cpu"
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            return func(*args).replace("torch.", "torch.cuda.")
        return func(*args, **kwargs)


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within, in this thread, they work on the CPU."""
    with (
        _NoCuda(),
        patch.object(torch.cuda, "current_device", lambda: "cpu"),
        patch.object(torch.cuda, "synchronize", lambda *_: None),
        patch.object(megatron, "needs_cuda", lambda _: None),
    ):
        yield
