"""What a rank must hold: a floor by arithmetic, to drop what cannot fit; and the dry run of a few layers, to
measure the rest.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from hydra import compose, initialize_config_module
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig

from ..train.config import typed
from .dryrun import Dry, Estimate, estimate, stood_in
from .ledger import HOST, Moved
from .plan_job import OFFLOADED, Candidate, Shape

# From the first on, each further layer adds the same: the peak is in the backward of the same block.
DEPTHS = 4, 5


@dataclass(frozen=True)
class Need:
    """Of one rank in a step. peak: bytes on the device when they are most, by what they are; host: bytes in
    host memory; activations: those of them that travel there and back; sent: what leaves it.
    """

    peak: dict[str, int]
    host: int
    activations: int
    sent: tuple[Moved, ...]

    @property
    def total(self) -> int:
        return sum(self.peak.values())


def floor(job: Shape, way: Candidate) -> dict[str, int]:
    """Bytes that a rank holds in any case, by what they are: less than any dry run gives."""
    share = way.tp * (1 if way.engine == "ddp" else way.dp * way.split)
    offload = way.engine.endswith(OFFLOADED)
    held = job.parameters // share
    tokens = way.micro * job.tokens // way.split // way.tp
    layer = job.dim
    if way.memory == "none":
        layer += 2 * job.heads * job.head_dim + 2 * job.kv_heads * job.head_dim + 2 * job.hidden
    kept = 0 if way.memory == "longest" else tokens * layer * job.layers * job.width
    return {
        "weights and optimizer": 0 if offload else 12 * held,
        "activations": kept,
    }


def local_tokens(job: Shape, way: Candidate) -> float:
    """Tokens whose activations a rank holds at a time."""
    return way.micro * job.tokens / (way.split * way.tp)


class Learned:
    """What dry runs have told of activations, for ways that were not run dry: bytes of each token that a rank
    holds, by memory preset and degree of tp, beside weights and optimizer.
    """

    def __init__(self) -> None:
        self.each: dict[tuple[str, int], float] = {}

    def add(self, job: Shape, way: Candidate, need: Need) -> None:
        """Takes the least of what each gave."""
        key, beside = (way.memory, way.tp), max(0, need.total - floor(job, way)["weights and optimizer"])
        self.each[key] = min(self.each.get(key, 2.0**60), beside / local_tokens(job, way))

    def likely(self, job: Shape, way: Candidate) -> dict[str, int]:
        """The floor, with activations as in what was run dry of this kind."""
        held = floor(job, way)
        least = int(self.each.get((way.memory, way.tp), 0.0) * local_tokens(job, way))
        return held | {"activations": max(least, held["activations"])}


def needed(given: Sequence[str], job: Shape, way: Candidate, node: int) -> Need:
    """By dry runs of jobs of few layers, from which all layers follow; of one that has no more, of itself."""
    if job.layers <= DEPTHS[1]:
        return _need(_dry(given, way, node, None))
    few, more = (_need(_dry(given, way, node, depth)) for depth in DEPTHS)
    times = (job.layers - DEPTHS[0]) / (DEPTHS[1] - DEPTHS[0])

    def along(a: int, b: int) -> int:
        return round(a + (b - a) * times)

    before = {(m.kind, m.ranks, m.link): m for m in few.sent}
    none = Moved("", 0, "", 0, 0)
    sent = []
    for m in more.sent:
        old = before.get((m.kind, m.ranks, m.link), none)
        sent.append(Moved(m.kind, m.ranks, m.link, along(old.bytes, m.bytes), along(old.calls, m.calls)))
    names = dict.fromkeys((*few.peak, *more.peak))
    peak = {name: along(few.peak.get(name, 0), more.peak.get(name, 0)) for name in names}
    return Need(
        {name: n for name, n in sorted(peak.items(), key=lambda x: -x[1]) if n > 0},
        along(few.host, more.host), along(few.activations, more.activations), tuple(sent),
    )  # fmt: skip


def _dry(given: Sequence[str], way: Candidate, node: int, layers: int | None) -> Estimate:
    words = [*given, *way.overrides(), f"world={way.world}", f"node={min(node, way.world)}"]
    # of a machine the last rank's neighbour is on another one, which its ring waits for
    words.append(f"rank={min(node, way.world) - 1}")
    if layers is not None:
        words.append(f"model.layers={layers}")
    return estimate(dry_config(words), flops=False)


def dry_config(words: Sequence[str]) -> DictConfig:
    """The config of a dry run, composed also while another one is Hydra's."""
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().clear()
    try:
        with initialize_config_module("longspan.conf", version_base="1.3"):
            return typed(stood_in(compose("dryrun", overrides=list(words))), Dry)
    finally:
        GlobalHydra.instance().hydra = before


def _need(found: Estimate) -> Need:
    return Need(found.peak, found.host, found.resting.get(HOST, 0), tuple(found.sent))
