"""Saved tensors that rest in host memory between forward and backward."""

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

# Below this many bytes a copy costs more than it frees.
LEAST = 2**16


class Host:
    """Host memory for what autograd saves under `hooks`: pinned, and copied on a stream of its own on CUDA,
    so that transfers run beside the work of other blocks. The tensor that was saved before the one in use is
    fetched ahead, as blocks run backward in reverse order. On the CPU it is a copy like any other.
    """

    def __init__(self, least: int = LEAST) -> None:
        self.least = least
        self._order: list[weakref.ref[_Resting]] = []
        self._stream: torch.cuda.Stream | None = None

    @property
    def held(self) -> int:
        """Bytes that rest in host memory now."""
        return sum(there.bytes for ref in self._order if (there := ref()) is not None)

    def hooks(self) -> saved_tensors_hooks:
        """A context; what is saved in it for the backward rests here."""
        return saved_tensors_hooks(self.pack, self.unpack)

    def pack(self, x: Tensor) -> Any:
        if x.numel() * x.element_size() < self.least or not x.is_floating_point():
            return x
        self._order = [ref for ref in self._order if ref() is not None]
        resting = _Resting(x, self._side(x.device), len(self._order))
        self._order.append(weakref.ref(resting))
        return resting

    def unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        assert isinstance(packed, _Resting)
        x = packed.taken()
        before = self._order[packed.place - 1]() if 0 < packed.place <= len(self._order) else None
        if before is not None and packed.stream is not None:
            before.fetch()
        return x

    def _side(self, device: torch.device) -> torch.cuda.Stream | None:
        if device.type == "cuda" and self._stream is None:
            self._stream = torch.cuda.Stream(device)
        return self._stream if device.type == "cuda" else None


class _Resting:
    """One tensor in host memory."""

    def __init__(self, x: Tensor, stream: torch.cuda.Stream | None, place: int) -> None:
        self.device, self.stream, self.place = x.device, stream, place
        self.back: Tensor | None = None
        self.ready: torch.cuda.Event | None = None
        self.host = torch.empty_like(x, device="cpu", pin_memory=stream is not None)
        self.bytes = self.host.numel() * self.host.element_size()
        if stream is None:
            self.host.copy_(x.detach())
            return
        stream.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(stream):
            self.host.copy_(x.detach(), non_blocking=True)
        # its memory may be given out again only when the copy is done
        x.record_stream(stream)

    def fetch(self) -> None:
        """Starts the way back, if it has not begun."""
        if self.back is not None:
            return
        if self.stream is None:
            self.back = self.host.clone()
            return
        with torch.cuda.stream(self.stream):
            self.back = self.host.to(self.device, non_blocking=True)
            self.ready = torch.cuda.Event()
            self.ready.record(self.stream)

    def taken(self) -> Tensor:
        """The tensor on its device, once it is there; a second backward fetches it again."""
        self.fetch()
        x, self.back = self.back, None
        assert x is not None
        if self.ready is not None:
            now = torch.cuda.current_stream(self.device)
            now.wait_event(self.ready)
            x.record_stream(now)
        return x
