"""How long a step takes: work at the kernels' rates, and of the transfers what no work hides."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import lru_cache

from ..kernels.concrete import concrete
from ..kernels.mask import Mask, Unsupported
from ..parallel.balance import ESTIMATE
from ..parallel.placement import named
from ..parallel.star import shape as star_of
from .ledger import Moved
from .plan_calibrate import attended
from .plan_hardware import Card, Interconnect, Rates
from .plan_job import OFFLOADED, Candidate, Shape
from .plan_traffic import recomputes

# Numbers that a layer reads and writes for each token beside its matrices and attention, forward, by the
# model's width and the MLP's: two norms, two residuals, rotated q and k; gate, up and their product. Counted
# by hand, and twice in the backward.
PASSED = 16, 8
# Bytes for each number of an output, and of dQ, dK and dV, when another hop's part is added to it in float32.
ADDED = 16, 12
# Bytes of an update of AdamW: weight, gradient and two moments in float32 read, all but the gradient written.
UPDATED = 28
# Seconds of a layer's attention of one whole sequence, above which no way's is timed here.
ATTENDS = 2.0
# A placement that is this uneven is not taken where another is more even.
EVEN = 1.05
USUAL = {"ring": "zigzag", "gather": "zigzag", "usp": "zigzag", "s2": "contiguous"}


@dataclass(frozen=True)
class Machine:
    """Where a plan is made for. node: devices of a machine. attends: attention is timed here, each way's own
    calls, where that of a whole sequence takes less than ATTENDS; else it is taken at the rates.
    """

    card: Card
    between: Interconnect
    node: int
    rates: Rates
    attends: bool = False


@dataclass(frozen=True)
class Times:
    """Seconds of a step on the busiest rank. layout, weights, tensor, host: transfers that no work hides: of
    keys, queries or heads; of weights and gradients; inside layers; of activations to host memory.
    """

    matrices: float
    attention: float
    elementwise: float
    optimizer: float
    layout: float = 0.0
    weights: float = 0.0
    tensor: float = 0.0
    host: float = 0.0

    @property
    def compute(self) -> float:
        return self.matrices + self.attention + self.elementwise

    @property
    def exposed(self) -> float:
        return self.layout + self.weights + self.tensor + self.host

    @property
    def total(self) -> float:
        return sum(asdict(self).values())


@lru_cache(maxsize=256)
@concrete
def most_pairs(mask: Mask, length: int, size: int, placement: str) -> float:
    """Visible pairs of the busiest of `size` ranks."""
    if size == 1:
        placement = "contiguous"
    return float(max(named(placement)(length, size, mask).work(mask, most=ESTIMATE)))


def placed(job: Shape, way: Candidate) -> Candidate:
    """The way with placement=auto, where its layout's own placement is uneven under the job's masks."""
    usual = USUAL.get(way.layout)
    if usual is None or way.ring == 1:
        return way

    def load(ranks: int, name: str) -> float:
        return sum(n * most_pairs(mask, job.tokens, ranks, name) for mask, n in job.masks)

    here = load(way.ring, usual)
    if here <= EVEN * load(1, usual) / way.ring or here <= EVEN * load(way.ring, "auto"):
        return way
    return replace(way, placement="auto")


def compute(job: Shape, way: Candidate, on: Machine) -> Times:
    """What the busiest rank works in a step."""
    rates, card, again = on.rates, on.card, recomputes(way)
    passes = way.micro * way.accumulate
    tokens = passes * job.tokens / way.split
    heads = -(-job.heads // (way.head * way.tp))
    name = way.placement or USUAL.get(way.layout, "contiguous")
    attention = 0.0
    for mask, layers in job.masks:
        # star spreads the work of its tail by keys, which no placement shows
        even = way.layout in ("star", "ulysses", "single")
        ranks = 1 if even else way.ring
        most = most_pairs(mask, job.tokens, ranks, name) / (way.ring if way.layout == "star" else 1)
        work = 4 * job.head_dim * heads * most
        forward, backward = work / rates.forward, 2.5 * work / rates.backward
        # heads of their own have other masks
        alike = not mask.per_head or way.head * way.tp == 1
        if on.attends and alike and way.layout != "star" and _short(job, mask, rates):
            forward, backward = attended(
                job, mask, on.node, heads=heads, kv_heads=-(-job.kv_heads // (way.head * way.tp)),
                ring=way.ring, placement=name, hops=way.layout in ("ring", "usp"),
            )  # fmt: skip
        else:
            attention += layers * way.accumulate * (2 + again) * _calls(job, way, mask) * rates.call
        attention += passes * layers * (forward * (1 + again) + backward)
    numbers = (PASSED[0] * job.dim + PASSED[1] * job.hidden) * job.layers * (3 + again)
    passed = numbers * job.width / way.tp + _added(job, way) * job.layers
    held = job.parameters / way.tp / (1 if way.engine == "ddp" else way.dp * way.split)
    offload = way.engine.endswith(OFFLOADED)
    return Times(
        matrices=2 * job.matrices * tokens / way.tp * (3 + again) / rates.matmul,
        attention=attention,
        elementwise=passed * tokens / (1e9 * card.memory_gbs),
        optimizer=held * UPDATED / (1e9 * (card.host_gbs if offload else card.memory_gbs)),
    )


def _short(job: Shape, mask: Mask, rates: Rates) -> bool:
    """The same for all ways, so that none is timed beside one that is not."""
    work = 4 * job.head_dim * job.heads * most_pairs(mask, job.tokens, 1, "contiguous")
    return work / rates.forward < ATTENDS


def _added(job: Shape, way: Candidate) -> float:
    """Bytes a token and layer for putting the parts of a ring's hops together, of what a rank has of all
    heads.
    """
    if way.layout not in ("ring", "usp"):
        return 0.0
    forward, backward = ADDED
    q, kv = (n * job.head_dim / way.tp for n in (job.heads, job.kv_heads))
    each = forward * q * (1 + recomputes(way)) + backward * (q + 2 * kv)
    return (way.ring - 1) * each


def _calls(job: Shape, way: Candidate, mask: Mask) -> int:
    """Attention calls of a layer."""
    if way.layout == "s2":
        return job.kv_heads // way.tp if mask.per_head else 1
    if way.layout == "star":
        return 1 + way.ring
    return 1 if way.layout == "gather" else way.ring


def timed(job: Shape, way: Candidate, on: Machine, moved: Sequence[Moved], host: int) -> Times:
    """A step in which a rank sends `moved` and rests `host` bytes of activations in host memory."""
    work = compute(job, way, on)
    seconds = {"layout": 0.0, "weights": 0.0, "tensor": 0.0, "hidden": 0.0}
    for m in moved:
        inside = way.tp > 1 and m.ranks == way.tp and m.kind not in ("send", "all-to-all")
        kind = "layout" if m.kind in ("send", "all-to-all") else "tensor" if inside else "weights"
        # a ring's shards travel while attention works on those that are here
        if m.kind == "send" and way.layout in ("ring", "usp") and on.card.overlap:
            kind = "hidden"
        seconds[kind] += transfer(m, way, on)
    host_s = 2 * host * way.accumulate / (1e9 * on.card.host_gbs * on.card.link_share)
    if way.engine.endswith(OFFLOADED):
        held = job.parameters / way.tp / (way.dp * way.split)
        host_s += held * (8 * way.accumulate + 4) / (1e9 * on.card.host_gbs * on.card.link_share)
    free = work.attention * (way.ring - 1) / way.ring if on.card.overlap else 0.0
    layout = seconds["layout"] + max(0.0, seconds["hidden"] - free)
    rest = work.compute - min(free, seconds["hidden"]) if on.card.overlap else 0.0
    # the first block's weights and the last one's gradients have nothing to hide behind
    ends = seconds["weights"] / job.layers
    weights = max(ends, seconds["weights"] - rest)
    rest = max(0.0, rest - seconds["weights"])
    return replace(
        work, layout=layout, weights=weights, tensor=seconds["tensor"], host=max(0.0, host_s - rest)
    )


def transfer(m: Moved, way: Candidate, on: Machine) -> float:
    """Seconds of these bytes in so many calls: latency and bandwidth of the slower link on their way."""
    card, between = on.card, on.between
    if m.link == "node":
        us, gbs = card.link_us, card.link_gbs
    else:
        # a collective over whole machines leaves each through the ports of all its cards at once
        ports = on.node // way.tp if m.kind not in ("send", "all-to-all") else 1
        us, gbs = between.us, min(card.link_gbs, ports * between.gbs)
    return m.calls * us / 1e6 + m.bytes / (1e9 * gbs * card.link_share)


def refused(job: Shape, way: Candidate) -> str | None:
    """Why the layout cannot serve the job's masks, in its own words."""
    if way.layout != "star":
        return None
    try:
        for mask, _ in job.masks:
            star_of(mask)
    except Unsupported as error:
        return str(error)
    return None
