"""python -m longspan.launch.dryrun experiment=llama70b_512k_64gpu world=64: a step of any job, without its
devices.
"""

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import hydra
import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam

from ..kernels.concrete import concrete
from ..train.agree import Ranks
from ..train.config import Root, made, typed
from ..train.engine.deepspeed import DeepSpeed
from ..train.engine.fsdp import FSDP
from ..train.engine.megatron import Megatron
from ..train.engine.tensor_parallel import rows_of
from ..train.entry import entry, guarded
from ..train.job import Job, Launch, assembled, build_layout, check_numbers, forget_meshes
from ..train.loop import backward, micro_batches
from ..train.progress import size
from .ledger import HOST, Ledger, Moved

GIB = 2**30
NEVER = 1e-12


@dataclass
class Dry(Root):
    """The root keys of conf/dryrun.yaml: those of train, and world: processes; rank: whose memory is shown;
    node: processes of a machine; memory_gib: of a device, null is not compared; json: file for the result.
    """

    world: int = 1
    rank: int = 0
    node: int = 8
    memory_gib: float | None = None
    json: str | None = None


@dataclass(frozen=True)
class Estimate:
    """One step of one rank. peak: bytes on the device when they are most, by what they are; resting: bytes
    in host memory when they are most there, by what they are.
    """

    world: int
    rank: int
    parameters: int
    tokens: int
    flops: float
    peak: dict[str, int]
    resting: dict[str, int]
    sent: list[Moved]
    mesh: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.peak.values())

    @property
    def host(self) -> int:
        return sum(self.resting.values())


@hydra.main(version_base="1.3", config_path="pkg://longspan.conf", config_name="dryrun")
def _composed(cfg: DictConfig) -> None:
    sys.exit(guarded(lambda: dryrun(typed(stood_in(cfg), Dry)), Launch()))


def stood_in(cfg: DictConfig) -> DictConfig:
    """The config with made-up data of the model's shape where there is nothing at data.path, or no path yet:
    a dry run needs shapes alone.
    """
    data, model = cfg.get("data"), cfg.get("model")
    if isinstance(data, DictConfig) and isinstance(model, DictConfig) and _absent(data):
        mock = _mock(data, model)
        if mock is not None:
            cfg = cfg.copy()
            cfg.data = mock
    if cfg.get("objective", {}).get("dropout"):
        # a dropped text is one word: none is, in a step that stands for all
        cfg.objective.dropout = NEVER
    if "init_sync" in cfg.get("engine", {}):
        cfg.engine.init_sync = False
    return cfg


def _absent(data: DictConfig) -> bool:
    if "path" not in data:
        return False
    if OmegaConf.is_missing(data, "path"):
        return True
    path = Path(str(data.path)).expanduser()
    # data=indexed takes the prefix of two files
    return not path.exists() and not path.with_name(f"{path.name}.bin").exists()


def _mock(data: DictConfig, model: DictConfig) -> dict[str, Any] | None:
    """What stands for tokens or latents; None where the model does not say of what shape."""
    if "context" in data:
        vocab = model.get("vocab")
        mock = {"_target_": "longspan.train.data.mock.Mock", "context": data.context, "vocab": vocab}
        return None if vocab is None else mock
    if not {"size", "channels"} <= model.keys():
        return None
    own = {name: model.get(name) for name in ("size", "channels", "classes", "text_dim", "pooled_dim")}
    return {"_target_": "longspan.train.data.mock_latents.MockLatents", **own}


def dryrun(cfg: DictConfig) -> int:
    """Prints the estimate, writes it as JSON if asked. ValueError for a job that cannot run, or does not
    fit.
    """
    found, console = estimate(cfg), Console(highlight=False)
    if ".mock" in cfg.data._target_:
        console.print("the data is made up (data=mock or mock_latents): no file was read")
    show(found, console)
    if cfg.json is not None:
        sums = {"total": found.total, "host": found.host}
        Path(cfg.json).write_text(json.dumps(asdict(found) | sums, indent=1) + "\n")
    if cfg.memory_gib is not None and found.total > cfg.memory_gib * GIB:
        most = max(found.peak, key=lambda name: found.peak[name])
        raise ValueError(
            f"memory_gib is {cfg.memory_gib:g}, and a rank needs {found.total / GIB:.1f} GiB: "
            f"{(found.total / GIB - cfg.memory_gib):.1f} GiB too many, most of them {most}"
        )
    return 0


def estimate(cfg: DictConfig, *, flops: bool = True) -> Estimate:
    """One step of the job in `cfg` on rank `cfg.rank` of `cfg.world`, with tensors that have no data. flops:
    counted too, which takes longer than all the rest at a million tokens; else they are 0.
    """
    check_numbers(cfg)
    for name, low in (("world", 1), ("node", 1), ("rank", 0)):
        if cfg[name] < low:
            raise ValueError(f"{name} is {cfg[name]}; it must be at least {low}")
    if cfg.rank >= cfg.world:
        raise ValueError(f"rank is {cfg.rank}; with world={cfg.world} it must be less")
    for kind, name in ((DeepSpeed, "deepspeed"), (Megatron, "megatron")):
        if isinstance(made(cfg.engine), kind):
            raise ValueError(
                f"engine={name} looks into its tensors, and a dry run has none with data: take engine=fsdp"
            )
    if cfg.train.compile:
        raise ValueError("train.compile is true; what is compiled cannot be counted: set train.compile=false")
    node = min(cfg.node, cfg.world)
    launch = Launch(cfg.rank, cfg.world, cfg.rank % node, node)
    device = torch.device("cpu")
    with _alone(launch):
        mesh, layout = build_layout(cfg, launch, device)
        data = made(cfg.data)
        with FakeTensorMode(allow_non_fake_inputs=True) as shapes:
            _, logits = rows_of(getattr(data, "vocab", 0), mesh["tp"].size(), mesh["tp"].get_local_rank())
            ledger = Ledger(logits, node)
            with ledger, _gathered(ledger):
                with ledger.during("engine buffers"):
                    job = assembled(cfg, launch, device, _alone_ranks(), mesh, layout, data, whole=True)
                ledger.name(job.model.parameters(), "parameters")
                ledger.name(job.model.buffers(), "buffers")
                return _stepped(job, ledger, shapes, flops)


def _stepped(job: Job, ledger: Ledger, shapes: FakeTensorMode, flops: bool) -> Estimate:
    """A step with the optimizer's state there, as in every step but the first."""
    trained = [p for p in job.model.parameters() if p.requires_grad]
    with ledger.during("optimizer"):
        for p in trained:
            p.grad = torch.zeros_like(p)
        job.engine.step(0.0, 0.0)
    ledger.away |= set(_away(job))
    ledger.restart()
    for p in trained:
        p.register_post_accumulate_grad_hook(lambda p: ledger.name([p.grad], "gradients"))
    if job.host is not None:
        job.host.pack = ledger.during(HOST)(job.host.pack)  # type: ignore[method-assign]
    train = job.cfg.train
    with unset_fake_temporarily():
        # how much of a batch is real, and how long its texts are, is in its data
        batches = micro_batches(job, 0, 0)
        valid = float(sum(b.valid for b in batches)) * job.dp
    backward(job, batches, valid, lambda part: _emptied(part, shapes))
    ledger.name([p.grad for p in trained if p.grad is not None], "gradients")
    with ledger.during("optimizer"):
        job.engine.step(job.optim.lr_at(0, train.steps), train.clip)
    return Estimate(
        world=job.launch.world,
        rank=job.launch.rank,
        mesh=dict(zip(job.mesh.mesh_dim_names or (), job.mesh.shape, strict=True)),
        parameters=sum(p.numel() for p in trained),
        tokens=sum(b.rows * b.length for b in batches) * job.dp,
        flops=job.objective.flops(batches) * job.dp if flops else 0.0,
        peak={name: int(n) for name, n in ledger.peak.most_common() if n},
        resting={name: int(n) for name, n in ledger.resting.most_common() if n},
        sent=ledger.moved(),
    )


def _away(job: Job) -> tuple[str, ...]:
    """What rests in host memory between its uses, besides activations."""
    if isinstance(job.engine, FSDP) and job.engine.offload:
        return "parameters", "gradients", "optimizer"
    return ("optimizer",) if job.cfg.memory.get("optimizer") == "host" else ()


@contextmanager
def _gathered(ledger: Ledger) -> Iterator[None]:
    """Where FSDP makes room for whole weights, that is what the bytes are. Meshes keep their values."""
    make = ledger.during("gathered weights")(FSDPParam.init_all_gather_outputs)
    join = staticmethod(concrete(DeviceMesh._concatenate))
    with (
        patch.object(FSDPParam, "init_all_gather_outputs", make),
        patch.object(DeviceMesh, "_concatenate", join),
    ):
        yield


def _emptied(part: Any, shapes: FakeTensorMode) -> Any:
    """The same with tensors that have no data."""
    if isinstance(part, Tensor):
        return shapes.from_tensor(part)
    if is_dataclass(part) and not isinstance(part, type):
        return replace(part, **{f.name: _emptied(getattr(part, f.name), shapes) for f in fields(part)})
    return part


@contextmanager
def _alone(launch: Launch) -> Iterator[None]:
    """A process group of `launch.world` ranks of which only this one exists; what it sends goes nowhere."""
    # FakeStore and the backend of this name are what torch tests its own collectives with
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise ValueError("a dry run makes its own process group: start it with python, not torchrun")
    dist.init_process_group("fake", rank=launch.rank, world_size=launch.world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()
        forget_meshes()


def _alone_ranks() -> Ranks:
    """Nobody to agree with."""
    return Ranks(dist.new_subgroups(1)[0] if dist.get_world_size() > 1 else None)


def show(found: Estimate, console: Console) -> None:
    """The estimate as tables."""
    memory = Table(title=f"memory of rank {found.rank} of {found.world} at its peak", title_justify="left")
    memory.add_column("what")
    memory.add_column("bytes", justify="right")
    memory.add_column("share", justify="right")
    for name, count in found.peak.items():
        memory.add_row(name, size(count), f"{count / found.total:.0%}")
    memory.add_row("together", size(found.total), "", style="bold")
    for name, count in found.resting.items():
        memory.add_row(f"in host memory: {name}", size(count), "")
    console.print(memory)
    moved = Table(title="sent by this rank in a step", title_justify="left")
    for name in ("collective", "over", "ranks", "calls", "bytes"):
        moved.add_column(name, justify="left" if name in ("collective", "over") else "right")
    for one in found.sent:
        moved.add_row(one.kind, one.link, str(one.ranks), str(one.calls), size(one.bytes))
    if found.sent:
        console.print(moved)
    mesh = " x ".join(f"{name} {n}" for name, n in found.mesh.items() if n > 1) or "one process"
    console.print(
        f"{found.parameters:,} parameters held here, {mesh}; {found.tokens:,} tokens a step, "
        f"{found.flops / 1e12:,.3g} TFLOP a step, {found.flops / found.world / 1e12:,.3g} a rank"
    )


def main() -> None:
    """Composes the config and runs dry; exit codes are listed in `train.entry`."""
    entry(_composed, "dryrun", os.environ)


if __name__ == "__main__":
    main()
