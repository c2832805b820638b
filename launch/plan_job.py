"""What a job is made of, as far as its cost goes; and the ways in which it could be split over devices."""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

from omegaconf import DictConfig
from torch._subclasses.fake_tensor import FakeTensorMode

from ..kernels.mask import Mask
from ..models.gpt import GPT
from ..parallel.mesh import MOST_HEAD
from ..train.config import made
from ..train.job import build_model
from ..train.meter import parameter_counts

LAYOUTS = ("single", "ring", "gather", "ulysses", "usp", "s2", "star")
MEMORIES = ("none", "long", "longest")
# Where weights rest in host memory: the name of the engine here, after a plus.
OFFLOADED = "+offload"
# A sequence of which a rank holds so many tokens fills a device: more at a time only take memory.
ENOUGH = 16384


@dataclass(frozen=True)
class Shape:
    """A decoder and what it is trained on. tokens: of a sequence; matrices: parameters that each token is
    multiplied with, the output layer among them; masks: the different ones, each with its number of layers.
    """

    tokens: int
    layers: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    parameters: int
    matrices: int
    masks: tuple[tuple[Mask, int], ...]
    precision: str

    @property
    def width(self) -> int:
        """Bytes of an activation."""
        return 2 if self.precision == "bfloat16" else 4


@dataclass(frozen=True)
class Candidate:
    """A way to run the job. layout, engine and memory are names of yaml files, the engine with `+offload`
    where its weights rest in host memory; placement None is the yaml's own.
    """

    layout: str
    dp: int
    ring: int
    head: int
    tp: int
    engine: str
    memory: str
    micro: int
    accumulate: int
    placement: str | None = None

    @property
    def split(self) -> int:
        """Ranks that share a sequence."""
        return self.ring * self.head

    @property
    def world(self) -> int:
        return self.dp * self.split * self.tp

    @property
    def sequences(self) -> int:
        """Of a step."""
        return self.dp * self.micro * self.accumulate

    def __str__(self) -> str:
        degrees = " ".join(f"{n}={d}" for n, d in self.degrees.items() if d > 1)
        placed = "" if self.placement is None else f", {self.placement}"
        return f"{self.layout} {degrees}{placed}, {self.engine}, memory={self.memory}, micro={self.micro}"

    @property
    def degrees(self) -> dict[str, int]:
        return {"dp": self.dp, "ring": self.ring, "head": self.head, "tp": self.tp}

    def overrides(self) -> list[str]:
        """The words of Hydra that make a training run so."""
        engine, _, offload = self.engine.partition(OFFLOADED[0])
        words = [f"parallel={self.layout}", *(f"parallel.mesh.{n}={d}" for n, d in self.degrees.items())]
        if self.placement is not None:
            inner = "inner." if self.layout == "usp" else ""
            words.append(f"parallel.layout.{inner}placement={self.placement}")
        words += [f"engine={engine}", *(["engine.offload=true"] if offload else [])]
        words += [f"memory={self.memory}", f"train.micro_batch={self.micro}"]
        return [*words, f"train.accumulate={self.accumulate}"]


def shape(cfg: DictConfig) -> Shape:
    """The job's. ValueError for a model that is no GPT, whose costs are not known here."""
    data, mask = made(cfg.data), made(cfg.mask)
    with FakeTensorMode():
        if not cfg.model._target_.endswith(".GPT"):
            raise ValueError(f"model is {cfg.model._target_}; a plan is made for GPT only: take a dry run")
        model: Any = build_model(cfg, data, mask)
        assert isinstance(model, GPT)
        whole, rest = parameter_counts(model)
        head = model.head.weight.numel()
        tied = model.head.weight is model.embed.weight
        block: Any = model.blocks[0]
        return Shape(
            tokens=data.context,
            layers=model.layers,
            dim=model.embed.embedding_dim,
            hidden=block.mlp.gate.out_features,
            heads=model.heads,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            parameters=whole,
            matrices=rest + head * tied,
            masks=tuple(Counter(model.masks).items()),
            precision=cfg.train.precision,
        )


def candidates(cfg: DictConfig, job: Shape, gpus: int, node: int) -> Iterator[Candidate]:
    """Every way in which `gpus` devices, `node` of them a machine, may share the job."""
    for layout, tp in product(chosen(cfg, "layouts"), _degrees(node)):
        if any(n % tp for n in (job.heads, job.kv_heads, job.hidden, gpus)):
            continue
        for ring, head in _splits(layout, job, gpus // tp, node // tp):
            dp = gpus // (tp * ring * head)
            for engine, memory in product(chosen(cfg, "engines"), chosen(cfg, "memories")):
                if tp > 1 and not engine.startswith("fsdp"):
                    continue
                for micro in _powers(cfg.micro):
                    steps = _accumulate(cfg, dp * micro)
                    if steps and (micro == 1 or micro * job.tokens // (ring * head) <= ENOUGH):
                        yield Candidate(layout, dp, ring, head, tp, engine, memory, micro, steps)


def chosen(cfg: DictConfig, name: str) -> Sequence[str]:
    """What is tried of layouts, engines or memories: as given, else all that serve this job."""
    fsdp = "fsdp_bf16" if cfg.train.precision == "bfloat16" else "fsdp"
    usual = {"layouts": LAYOUTS, "engines": ("ddp", fsdp, fsdp + OFFLOADED), "memories": MEMORIES}
    given = cfg[name]
    if given is None:
        return usual[name]
    known = {*usual[name], *("fsdp", "fsdp_bf16", "fsdp+offload", "fsdp_bf16+offload") * (name == "engines")}
    for word in given:
        if word not in known:
            raise ValueError(f"{name} has {word!r}; a plan can be made of {', '.join(sorted(known))}")
    return list(given)


def _accumulate(cfg: DictConfig, at_once: int) -> int:
    """Micro batches of a step; 0 where a step's sequences do not divide."""
    if cfg.batch is None:
        return int(cfg.train.accumulate)
    return 0 if cfg.batch % at_once else cfg.batch // at_once


def _splits(layout: str, job: Shape, ranks: int, node: int) -> Iterator[tuple[int, int]]:
    """(ring, head) of a layout, of as many of the ranks as share a sequence."""
    sizes = [n for n in range(1, min(ranks, job.tokens) + 1) if ranks % n == 0]
    if layout == "single":
        yield 1, 1
    elif layout == "ulysses":
        yield from ((1, n) for n in sizes if 1 < n <= job.heads)
    elif layout == "usp":
        for head in sizes:
            if 1 < head <= min(MOST_HEAD, job.heads) and node % head == 0:
                yield from ((n // head, head) for n in sizes if n > head and n % head == 0)
    else:
        yield from ((n, 1) for n in sizes if n > 1)


def _degrees(node: int) -> list[int]:
    return [n for n in _powers(min(node, 8)) if node % n == 0]


def _powers(most: int) -> list[int]:
    return [2**i for i in range(most.bit_length()) if 2**i <= most]
