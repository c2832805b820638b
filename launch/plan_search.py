"""Which way is best: all are counted, those that cannot fit are dropped, the promising ones are run dry."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from .plan_cost import Machine, Times, placed, refused, timed
from .plan_job import MEMORIES, OFFLOADED, Candidate, Shape
from .plan_memory import Learned, Need, floor
from .plan_traffic import planned

GIB = 2**30
# A way is not run dry where so much of what others like it held is too much: layouts differ by less.
MARGIN = 0.9
Measure = Callable[[Candidate], Need]


@dataclass(frozen=True)
class Verdict:
    """A way and what was found: times, and need where it was run dry; lost: why, None for those that fit."""

    way: Candidate
    times: Times
    need: Need | None = None
    lost: str | None = None

    def per_token(self, job: Shape) -> float:
        """Seconds of a step for each of its tokens."""
        return self.times.total / (self.way.sequences * job.tokens)


@dataclass(frozen=True)
class Found:
    """best: what fits, the fastest first. losers: all others that were run dry, and of each layout that
    cannot fit or is refused the one that comes nearest, with the reason. guesses: of each layout the most
    promising of the ways that were set aside, `skipped` of the `counted`. learned: of their memory.
    """

    best: tuple[Verdict, ...]
    losers: tuple[Verdict, ...]
    guesses: tuple[Verdict, ...]
    skipped: int
    counted: int
    learned: Learned


def guessed(job: Shape, way: Candidate, on: Machine) -> Verdict:
    """With traffic in closed form; lost if it cannot fit or be served at all."""
    why = refused(job, way)
    if why is not None:
        return Verdict(way, Times(0, 0, 0, 0), lost=why)
    resting = way.memory == "longest"
    tokens = way.micro * job.tokens // way.split
    host = tokens * job.dim * 4 * job.layers if resting else 0
    return Verdict(way, timed(job, way, on, planned(job, way, on.node), host))


def search(
    job: Shape, ways: Iterable[Candidate], on: Machine, measure: Measure, *, room_gib: float, tries: int,
    best: int,
) -> Found:  # fmt: skip
    """Runs the most promising ways dry, `tries` of them, until `best` fit and no other promises more.

    room_gib: of a device. The others stay as guesses; ways that hold less than one that fits, at a price in
    time, are not looked at.
    """
    everything = [guessed(job, placed(job, way), on) for way in ways]
    rest, losers = _sorted_out(job, everything, room_gib)
    fits: list[Verdict] = []
    aside: list[Verdict] = []
    tried, learned = 0, Learned()
    for verdict in rest:
        way = verdict.way
        known = any(_cheaper(kept.way, way) for kept in fits)
        known |= MARGIN * sum(learned.likely(job, way).values()) > room_gib * GIB
        if known or tried >= tries or _late(verdict, fits, job, best):
            aside.append(verdict)
        else:
            tried += 1
            judged = _judged(job, verdict, on, measure, room_gib)
            (losers if judged.lost else fits).append(judged)
            if judged.need is not None:
                learned.add(job, way, judged.need)
    fits.sort(key=lambda v: v.per_token(job))
    # sorted: the first of each layout promises the most
    room = room_gib * GIB
    likely = [v for v in aside if sum(learned.likely(job, v.way).values()) <= room]
    guesses = {v.way.layout: v for v in reversed(likely)}
    last = tuple(losers) + tuple(fits[best:])
    return Found(tuple(fits[:best]), last, tuple(guesses.values()), len(aside), len(everything), learned)


def _sorted_out(
    job: Shape, everything: Sequence[Verdict], room_gib: float
) -> tuple[list[Verdict], list[Verdict]]:
    """What may fit, the most promising first; and of each layout what is refused or comes nearest to fit."""
    # the same refusal for every degree is said once
    losers = list({v.lost: v for v in everything if v.lost is not None}.values())
    rest = []
    nearest: dict[str, tuple[float, Verdict]] = {}
    for verdict in (v for v in everything if v.lost is None):
        least = floor(job, verdict.way)
        over = sum(least.values()) / GIB - room_gib
        layout = verdict.way.layout
        if over <= 0:
            rest.append(verdict)
        elif layout not in nearest or over < nearest[layout][0]:
            nearest[layout] = over, _too_large(verdict, least, over, None, "cannot fit: at least ")
    served = {v.way.layout for v in rest}
    losers += [v for layout, (_, v) in nearest.items() if layout not in served]
    return sorted(rest, key=lambda v: v.per_token(job)), losers


def _judged(job: Shape, verdict: Verdict, on: Machine, measure: Measure, room_gib: float) -> Verdict:
    way = verdict.way
    try:
        need = measure(way)
    except ValueError as error:
        return Verdict(way, verdict.times, lost=str(error))
    times = timed(job, way, on, need.sent, need.activations)
    over = need.total / GIB - room_gib
    if over > 0:
        return _too_large(Verdict(way, times), need.peak, over, need, "does not fit by ")
    if need.host / GIB > on.card.host_gib:
        much = f"needs {need.host / GIB:.0f} GiB of host memory a rank, and there are {on.card.host_gib:g}"
        return Verdict(way, times, need, much)
    return Verdict(way, times, need)


def _too_large(verdict: Verdict, held: dict[str, int], over: float, need: Need | None, words: str) -> Verdict:
    most = max(held, key=lambda name: held[name])
    said = f"{words}{over:.1f} GiB{' too many' if need is None else ''}: {most} {held[most] / GIB:.1f} GiB"
    return Verdict(verdict.way, verdict.times, need, said)


def _cheaper(kept: Candidate, way: Candidate) -> bool:
    """Whether `kept`, which fits, is the same without what `way` does to hold less."""
    if (kept.layout, kept.degrees, kept.micro) != (way.layout, way.degrees, way.micro):
        return False
    price = tuple((MEMORIES.index(x.memory), x.engine.endswith(OFFLOADED)) for x in (kept, way))
    same = kept.engine.removesuffix(OFFLOADED) == way.engine.removesuffix(OFFLOADED)
    return same and price[0][0] <= price[1][0] and price[0][1] <= price[1][1]


def _late(verdict: Verdict, fits: Sequence[Verdict], job: Shape, best: int) -> bool:
    """Whether enough fit that are surely faster than this one's guess says."""
    faster = [v for v in fits if v.per_token(job) < 0.8 * verdict.per_token(job)]
    return len(faster) >= best


def by_layout(job: Shape, found: Found) -> dict[str, Verdict]:
    """The best of each layout: one that fits, else one that was set aside, else one that does not fit."""
    pool = [v for v in (*found.best, *found.losers, *found.guesses) if v.times.total]

    def order(v: Verdict) -> tuple[bool, bool, float]:
        return v.lost is not None, v.need is None, v.per_token(job)

    ranked = sorted(pool, key=order)
    return {name: next(v for v in ranked if v.way.layout == name) for name in {v.way.layout: 0 for v in pool}}
