"""A device that has no room left: how much there was, what took it, and what to change, in one line."""

import gc
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn

from .agree import PeerError
from .engine.states import local
from .meter import peak_memory
from .progress import size
from .trace import FOLDER

# What torch says on the CPU, where running out of memory has no class of its own.
ON_HOST = "DefaultCPUAllocator"
DDP = "longspan.train.engine.ddp.DDP"


class OutOfMemory(RuntimeError):
    """A rank ran out of memory; the message is one line that says what to change."""


@dataclass(frozen=True)
class Held:
    """Bytes. peak: the most that was in use; parts: of it, by what they are."""

    peak: int
    parts: Mapping[str, int]
    where: str

    def words(self) -> str:
        """The peak, and its parts from the largest on."""
        order = sorted(self.parts, key=lambda name: -self.parts[name])
        told = ", ".join(f"{name} {size(self.parts[name])}" for name in order if self.parts[name])
        return f"{size(self.peak)} at most on {self.where}" + (f": {told}" if told else "")

    @property
    def most(self) -> str:
        return max(self.parts, key=lambda name: self.parts[name])


@contextmanager
def explained(cfg: DictConfig, folder: Path, model: nn.Module | None = None) -> Iterator[None]:
    """Makes one line of running out of memory meanwhile, and on CUDA leaves a snapshot of who held what in
    traces/memory-rank<r>.pickle of the run folder. model: None while it is being built. Raises OutOfMemory.
    """
    try:
        yield
    except Exception as error:
        if not _ran_out(error):
            raise
        wanted = " ".join(str(error).split())
        peak = peak_memory()
        if torch.cuda.is_initialized():
            _snapshot(folder)
        # the frames of the failed step hold its activations
        traceback.clear_frames(error.__traceback__)
        error.__traceback__ = error.__context__ = error.__cause__ = None
        held = measured(model, peak)
        said = f"out of memory, {held.words()}. {advice(cfg, held.most)}. Torch says: {wanted[:160]}"
        raise OutOfMemory(said) from None


def _ran_out(error: Exception) -> bool:
    # what another rank ran out of is told there
    here = ON_HOST in str(error) and not isinstance(error, PeerError)
    return isinstance(error, torch.OutOfMemoryError) or here


def _snapshot(folder: Path) -> None:
    # there may be no room on the disk either
    with suppress(OSError, RuntimeError):
        (folder / FOLDER).mkdir(exist_ok=True)
        torch.cuda.memory._dump_snapshot(str(folder / FOLDER / f"memory-rank{dist.get_rank()}.pickle"))


def measured(model: nn.Module | None, peak: int) -> Held:
    """What of `peak` bytes is what. What stays between two steps, besides weights and gradients, is the
    optimizer's, and the rest activations; without CUDA nobody counts, and only the first two are known.
    """
    gc.collect()
    parameters = [] if model is None else list(model.parameters())
    weights = [local(p) for p in parameters]
    grads = [local(p.grad) for p in parameters if p.grad is not None]
    parts = {"parameters": _bytes(weights), "gradients": _bytes(grads)}
    if not torch.cuda.is_initialized():
        return Held(peak, parts | {"the rest": max(0, peak - sum(parts.values()))}, "the host")
    stays = torch.cuda.memory_allocated()
    parts["optimizer"] = max(0, stays - sum(parts.values()))
    parts["activations"] = max(0, peak - stays)
    device = torch.cuda.current_device()
    room = torch.cuda.get_device_properties(device).total_memory
    return Held(peak, parts, f"cuda:{device}, which has {size(room)}")


def _bytes(tensors: list[torch.Tensor]) -> int:
    return sum(x.numel() * x.element_size() for x in tensors)


def advice(cfg: DictConfig, most: str) -> str:
    """What to change, in this order, with what it is now; what cannot be changed further is left out."""
    memory, mesh = cfg.memory, OmegaConf.to_container(cfg.parallel.mesh)
    steps = []
    if most in ("parameters", "gradients", "optimizer") and cfg.engine._target_ == DDP:
        steps.append("engine=fsdp (now ddp, whose every rank holds all weights)")
    recompute, offload = memory.get("recompute", "none"), memory.get("offload", False)
    if recompute == "none" or not memory.get("mlp_tile", 0):
        steps.append(f"memory=long (now recompute={recompute}, mlp_tile={memory.get('mlp_tile', 0)})")
    if not offload:
        steps.append("memory=longest (now offload=false)")
    if cfg.train.micro_batch > 1:
        micro, several = cfg.train.micro_batch, cfg.train.accumulate
        steps.append(
            f"train.micro_batch={micro // 2} train.accumulate={several * 2} (now {micro} and {several})"
        )
    assert isinstance(mesh, dict)
    degrees = ", ".join(f"{axis} {mesh[axis]}" for axis in ("dp", "ring", "head", "tp") if axis in mesh)
    steps.append(f"more ranks on the sequence, which ring x head split (now {degrees})")
    return "Change, in this order: " + "; ".join(f"{i}. {step}" for i, step in enumerate(steps, 1))
