"""One training job put together from its config: processes, mesh, layout, data, model, engine."""

import datetime
import gc
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor.debug import _clear_sharding_prop_cache

from ..kernels.mask import Mask
from ..models.memory import Memory
from ..models.offload import Host
from ..parallel.layout import Layout
from ..parallel.mesh import Heads
from .agree import Ranks
from .config import made
from .data.sample import Dataset
from .ema import EMA
from .engine.fsdp import FSDP
from .engine.protocol import Apart, Build, Engine
from .huggingface.start import later, start
from .objective.protocol import Objective
from .optim import Optim
from .rounding import rounded
from .singly import singly

# what is told of a rank that fails
KINDS = (ValueError, FileNotFoundError, OSError)
# the first tokenization of a large corpus takes hours; a rank that dies meanwhile is noticed at once
PREPARING = datetime.timedelta(days=1)


@dataclass(frozen=True)
class Launch:
    """Who this process is, as torchrun says it; a process started alone is rank 0 of 1. env: the environment,
    for trackers.
    """

    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    env: Mapping[str, str] | None = None

    @classmethod
    def of(cls, env: Mapping[str, str]) -> "Launch":
        rank, world, local_rank = (
            int(env.get(n, d)) for n, d in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
        )
        return cls(rank, world, local_rank, _on_a_node(env, world), env)


def _on_a_node(env: Mapping[str, str], world: int) -> int:
    """How many of `world` processes are on a machine: what torchrun says, else srun, whose `8(x2),4` is two
    machines of 8 and one of 4. Of machines that differ, the number that divides them all, so that no such
    group of neighbours leaves its machine.
    """
    if "LOCAL_WORLD_SIZE" in env:
        return int(env["LOCAL_WORLD_SIZE"])
    told = env.get("SLURM_STEP_TASKS_PER_NODE") or env.get("SLURM_NTASKS_PER_NODE") or "1"
    return math.gcd(world, *(int(part.partition("(")[0]) for part in told.split(",")))


@contextmanager
def processes(launch: Launch, wanted: str, timeout_s: float) -> Iterator[torch.device]:
    """An initialised process group (one that exists is used as it is) and this rank's device. On the CPU this
    rank has its share of the cores meanwhile.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if wanted == "auto" else wanted
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(
            f"device is {wanted!r}; it can be auto, cpu{', cuda' if torch.cuda.is_available() else ''} here"
        )
    if timeout_s <= 0:
        raise ValueError(f"timeout_s is {timeout_s}; it must be more than 0 seconds")
    device = torch.device(kind, launch.local_rank) if kind == "cuda" else torch.device("cpu")
    with _threads(device, launch):
        if dist.is_initialized():
            with _own_groups():
                yield device
            return
        _connect(launch, kind, datetime.timedelta(seconds=timeout_s))
        try:
            yield device
        except BaseException:
            # tearing down waits for peers, who may never come
            if launch.world == 1:
                dist.destroy_process_group()
            raise
        dist.destroy_process_group()
        forget_meshes()


@contextmanager
def _own_groups() -> Iterator[None]:
    """Groups that are made meanwhile end with it: each has threads of its own, which would add up from job to
    job. After an error they stay, since peers may still wait in them.
    """
    there = dist.distributed_c10d._world.pg_map
    before = set(there)
    yield
    # layouts and engines refer to each other in circles, and hold their groups
    gc.collect()
    for group in [group for group in there if group not in before]:
        dist.destroy_process_group(group)
    forget_meshes()
    gc.collect()


def forget_meshes() -> None:
    """To be called where process groups have ended: DTensor keeps meshes by their ranks, and would hand out
    old ones to those that come after.
    """
    _clear_sharding_prop_cache()


@contextmanager
def _threads(device: torch.device, launch: Launch) -> Iterator[None]:
    before = torch.get_num_threads()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        # more threads than cores make ranks that share a machine ten times slower
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // launch.local_world))
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _connect(launch: Launch, kind: str, timeout: datetime.timedelta) -> None:
    """Initialises the process group. OSError if the ranks cannot find each other."""
    backend = "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo"
    if launch.world == 1:  # no port is needed
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1, timeout=timeout)
        return
    try:
        dist.init_process_group(backend, timeout=timeout)
    except (ValueError, dist.DistError) as error:
        env = launch.env or {}
        where = f"MASTER_ADDR={env.get('MASTER_ADDR')} MASTER_PORT={env.get('MASTER_PORT')}"
        raise ConnectionError(
            f"rank {launch.rank} of {launch.world} cannot join the others at {where}: "
            f"{str(error).splitlines()[0]}; torchrun --standalone finds a free port"
        ) from None


@dataclass(frozen=True)
class Job:
    """Everything that a step needs."""

    cfg: DictConfig
    launch: Launch
    device: torch.device
    ranks: Ranks
    mesh: DeviceMesh
    layout: Layout
    data: Any  # a `Dataset` of text, or `Clips`: the objective knows
    mask: Mask
    model: Any  # an nn.Module with `masks` and `kv_heads`
    objective: Objective
    engine: Engine
    optim: Optim
    ema: EMA | None
    host: Host | None = None  # where activations rest that are not on the device

    def state(self) -> dict[str, Any]:
        """All tensors of a checkpoint, also as the template that one is loaded into."""
        averaged = {} if self.ema is None else {"ema": self.ema.state()}
        return self.engine.save() | averaged

    def load(self, state: dict[str, Any]) -> None:
        """Takes back what `state` gave, after a checkpoint was read into it."""
        self.engine.load({name: part for name, part in state.items() if name != "ema"})
        if self.ema is not None:
            self.ema.load(state["ema"])

    def averaged(self) -> AbstractContextManager[None]:
        """The model with what is evaluated: the average of its weights, if one is kept."""
        return nullcontext() if self.ema is None else self.ema.applied(self.model)

    @property
    def context(self) -> int:
        """Tokens of a sequence, over all ranks."""
        return self.objective.context(self.data)

    @property
    def dp(self) -> int:
        return int(self.mesh["dp"].size())

    @property
    def dp_rank(self) -> int:
        return int(self.mesh["dp"].get_local_rank())

    @property
    def global_batch(self) -> int:
        """Sequences in a step."""
        return int(self.cfg.train.micro_batch) * int(self.cfg.train.accumulate) * self.dp


def open_data(cfg: DictConfig, launch: Launch, ranks: Ranks) -> Any:
    """The data set on every rank; one rank of each machine prepares its cache first, for which the others
    wait longer than for a step. What fails on one fails on all.
    """

    def prepare() -> None:
        if launch.local_rank == 0:
            made(cfg.data)

    Ranks(kinds=KINDS, wait=PREPARING).together(prepare)
    return ranks.together(lambda: made(cfg.data))


def build_layout(cfg: DictConfig, launch: Launch, device: torch.device) -> tuple[DeviceMesh, Layout]:
    heads = _heads(cfg.model)
    mesh: DeviceMesh = made(cfg.parallel.mesh).build(device.type, node=launch.local_world, heads=heads)
    layout: Layout = made(cfg.parallel.layout)(mesh)
    split = mesh["ring"].size() * mesh["head"].size()
    if layout.size != split:
        raise ValueError(
            f"parallel.mesh splits a sequence over {split} ranks (ring {mesh['ring'].size()} x head "
            f"{mesh['head'].size()}), but parallel.layout {type(layout).__name__} uses {layout.size}: "
            f"set the degree of the axis that it does not use to 1, or take parallel=usp, which uses both"
        )
    return mesh, layout


def _heads(model: DictConfig) -> Heads | None:
    """The heads that a config gives a model, which is not built yet; None if it names none."""
    q = model.get("heads")
    return None if q is None else Heads(q, model.get("kv_heads") or q)


def build_model(cfg: DictConfig, data: Any, mask: Mask) -> nn.Module:
    """The model with the same initial weights on every rank and in every layout."""
    given: dict[str, Any] = {"mask": mask}
    if "vocab" in cfg.model:
        given["vocab"] = _vocab(cfg.model.vocab, data)
    if "mask" in cfg.model:
        raise ValueError("model.mask is taken from mask: set that, and leave model.mask out")
    torch.manual_seed(cfg.seed)
    model: nn.Module = made(cfg.model)(**given)
    if cfg.lora is not None:
        made(cfg.lora).apply(model)
    return model


def _without_storage() -> AbstractContextManager[Any]:
    return torch.device("meta")


def _vocab(given: int | None, data: Any) -> int:
    """The number of token ids, by default the data's."""
    if not isinstance(data, Dataset):
        raise ValueError(f"data is {type(data).__name__}, which is no text: take data=text or the like")
    if given is not None and given < data.vocab:
        raise ValueError(
            f"model.vocab is {given}, but the data's tokenizer has {data.vocab} tokens: set model.vocab=null"
        )
    return given or data.vocab


def build(cfg: DictConfig, launch: Launch, device: torch.device) -> Job:
    """The whole job. Every check that needs no device has run when the model is built."""
    check_numbers(cfg)
    ranks = Ranks(kinds=KINDS)
    mesh, layout = build_layout(cfg, launch, device)
    return assembled(cfg, launch, device, ranks, mesh, layout, open_data(cfg, launch, ranks))


def assembled(
    cfg: DictConfig, launch: Launch, device: torch.device, ranks: Ranks, mesh: DeviceMesh, layout: Layout,
    data: Any, *, whole: bool = False,
) -> Job:  # fmt: skip
    """The job of these ranks over this data: model, memory, objective, engine. whole: also a model that
    starts from a folder is there on every rank before the engine shards it.
    """
    mask: Mask = made(cfg.mask)
    engine: Engine = made(cfg.engine)
    late = not whole and cfg.init.path is not None and isinstance(engine, FSDP)
    with _without_storage() if late else nullcontext():
        model = build_model(cfg, data, mask)
    if device.type != "cpu" and not late:
        model.to(device)
    objective: Objective = made(cfg.objective)(model)
    source = ranks.together(lambda: start(model, cfg.init, objective.context(data), cfg.seed))
    memory: Memory = made(cfg.memory)
    if memory.float8:
        from . import float8

        float8.check(cfg, engine, mesh, device)
        float8.convert(model, memory.float8)
    if cfg.train.compile:
        # what compiles is imported only where it is asked for
        from . import compiled

        compiled.check(cfg, engine, mesh)
        compiled.compile_blocks(model)
    host = memory.apply(model)
    # placed as training will: what the layout cannot serve is refused now, not in the middle of a run
    objective.placement(data, layout, mask)
    optim: Optim = made(cfg.optim)
    assert isinstance(objective, nn.Module)
    build: Build = optim.build
    host_state = memory.optimizer == "host"
    if memory.weights == "bfloat16":
        build = rounded(build, cfg.seed, host=host_state)
    elif host_state:
        build = singly(build)
    if late and source is not None:
        room = torch.device("cpu") if isinstance(engine, FSDP) and engine.offload else device
        build = later(build, source, objective, ranks, room, cfg.seed)
    engine.wrap(objective, build, mesh)
    apart = engine.weights() if isinstance(engine, Apart) else None
    ema = EMA(model, decay=cfg.train.ema, apart=apart) if cfg.train.ema else None
    return Job(
        cfg, launch, device, ranks, mesh, layout, data, mask, model, objective, engine, optim, ema, host
    )


def check_numbers(cfg: DictConfig) -> None:
    """Refuses numbers that no job can run with."""
    least: dict[str, float] = {
        "train.steps": 1, "train.micro_batch": 1, "train.accumulate": 1, "train.clip": 0,
        "train.log_every": 1, "checkpoint.every": 0, "checkpoint.keep": 1, "checkpoint.permanent": 0,
        "eval.every": 0, "eval.samples": 1, "eval.final": 0, "trace.first": 1, "trace.steps": 1,
        "heartbeat_s": 0,
    }  # fmt: skip
    for name, low in least.items():
        value = OmegaConf.select(cfg, name)
        if value is not None and not value >= low:
            raise ValueError(f"{name} is {value}; it must be at least {low:g}")
    if cfg.data.get("buckets") is not None and cfg.train.micro_batch != 1:
        raise ValueError(
            f"train.micro_batch is {cfg.train.micro_batch}, but with data.buckets={cfg.data.buckets} each "
            f"sample is a batch of its own: set it to 1"
        )
    if cfg.train.precision not in ("float32", "bfloat16"):
        raise ValueError(f"train.precision is {cfg.train.precision!r}; it can be float32 or bfloat16")
    if not 0 <= cfg.train.ema < 1:
        raise ValueError(f"train.ema is {cfg.train.ema}; it must be from 0 (none) to less than 1")
    if cfg.train.seconds is not None and cfg.train.seconds <= 0:
        raise ValueError(f"train.seconds is {cfg.train.seconds}; it must be null or more than 0")


def run_folder(cfg: DictConfig, now: datetime.datetime) -> Path:
    """The run's folder: run.dir, or run.root / run.name, or one named after the experiment and the time."""
    if cfg.run.dir is not None:
        return Path(cfg.run.dir)
    name = cfg.run.name or f"{cfg.experiment_name}-{now:%Y%m%d-%H%M%S}"
    if Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"run.name is {name!r}; it must be one plain folder name (run.dir takes a path)")
    return Path(cfg.run.root) / name
