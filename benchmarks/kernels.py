"""Our kernels beside what people would take instead, forward and backward, with the same masks, in one run.

On a GPU the Triton kernels and, last, the work of a ring's ranks; on a CPU the cpu backend. Writes
benchmarks/results/kernels-<device>.json and a picture beside it. `make gpu-bench ARGS='--case s2'` passes
options on.
"""

import argparse
import os
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from longspan.kernels import flash_forward
from longspan.kernels.grain import grain
from longspan.kernels.tile import tiles

from . import exact, report, virtual_ranks
from .area import area
from .cases import Case, Job, Shape, jobs
from .figure import draw
from .peers import Contender, Skip, contenders
from .report import Both, Entry, Found, Results
from .timing import Attempt, Clock, CpuClock, CudaClock


@dataclass(frozen=True)
class Pace:
    """Guesses, on the slow side, that tell what there is still time for."""

    flops: float  # a second, of attention in the dtype of the case
    exact: float  # a second, of the float64 slice
    compile: float  # seconds for our kernels, when a mask meets a head shape first
    flex: float  # seconds for FlexAttention, each time


RING = 60.0  # seconds of the budget that are kept for the ranks of a ring
PACES = {"cuda": Pace(2e14, 1.5e13, 15.0, 30.0), "cpu": Pace(1e10, 5e9, 0.0, 0.0)}


@dataclass(frozen=True)
class Bench:
    """How to measure: on what, whom, until when, and for how long each case."""

    device: torch.device
    clock: Clock
    contenders: tuple[Contender, ...]
    deadline: float  # of time.perf_counter
    seconds: float = 1.0
    rounds: int = 20

    def of(self, job: Job) -> list[Contender]:
        """Who takes part."""
        return [x for x in self.contenders if x.name not in job.without and x.name in (job.only or x.name)]

    def left(self) -> float:
        return self.deadline - time.perf_counter()


def run(bench: Bench, plan: Sequence[Job], results: Results) -> Iterator[tuple[Entry, list[str]]]:
    """Measure one job after the other, each given with the names of those measured; what the time left is too
    short for is named in `results` instead.
    """
    met: set[tuple[str, Shape]] = set()
    for job in plan:
        case, who = job.case, bench.of(job)
        names, kernel = [x.name for x in who], (case.name.partition("/")[0], case.shape)
        known = results.entries.get(case.key)
        pairs = known.pairs if known else area(case.mask, case.at, case.shape.kv_heads, bench.device)
        if estimate(case, pairs, names, bench.device, new=kernel not in met) > bench.left():
            results.dropped.append(f"{case}, {' '.join(names)}")
            continue
        met.add(kernel)
        entry = known or results.entries.setdefault(case.key, Entry(case, pairs, lists_ms(case, bench)))
        entry.found.update(measure(case, who, bench))
        yield entry, names


def estimate(case: Case, pairs: float, names: Sequence[str], device: torch.device, *, new: bool) -> float:
    """Seconds that a job may take; `new` if our kernels have to be compiled for it."""
    pace, shape = PACES[device.type], case.shape
    work = 14 * shape.q_heads * pairs * shape.head_dim
    slice_work = 14 * shape.q_heads / shape.kv_heads * case.tokens**2 * shape.head_dim
    compiling = pace.compile * (new and "longspan" in names) + pace.flex * ("flex" in names)
    return 1.0 + compiling + 6 * work * len(names) / pace.flops + slice_work / pace.exact


def lists_ms(case: Case, bench: Bench) -> float:
    """Building the lists of tiles that our three kernels read, from nothing; the least of three."""
    sample = torch.empty(1, 1, 1, case.shape.head_dim, dtype=case.dtype, device=bench.device)
    device = flash_forward.capability(sample)
    best = flash_forward.config(case.shape.head_dim, case.dtype, device, grain(case.mask))
    wanted = {(b.queries, b.keys, b is best.dkdv) for b in best}
    times = []
    for _ in range(3):
        bench.clock.wait()
        start = time.perf_counter()
        for queries, keys, transpose in wanted:
            tiles.__wrapped__(
                case.mask, case.at, case.at, case.shape.kv_heads,
                size=(queries, keys), transpose=transpose, device=bench.device,
            )  # fmt: skip
        bench.clock.wait()
        times.append(1e3 * (time.perf_counter() - start))
    return min(times)


def measure(case: Case, who: Sequence[Contender], bench: Bench) -> dict[str, Found | str]:
    """Each contender's times, errors and memory, or why it has none."""
    inputs = exact.given(case, bench.device)
    right = exact.truth(case, inputs)
    found: dict[str, Found | str] = {}
    attempts: dict[str, Attempt] = {}
    for contender in who:
        start = time.perf_counter()
        try:
            attempt = contender.build(case, inputs)
            result = attempt.result()
            bench.clock.wait()
            first = time.perf_counter() - start
            errors = exact.errors(case, result, right)
            gib = bench.clock.memory(attempt)
        except Skip as reason:
            found[contender.name] = str(reason)
        # whatever goes wrong with one must not end the run: it stands in the table and on stderr, and if it
        # is ours in the exit status
        except Exception as error:
            traceback.print_exc()
            line = (str(error).strip() or "no message").splitlines()[0]
            found[contender.name] = f"failed: {type(error).__name__}: {line}"
        else:
            attempts[contender.name] = attempt
            found[contender.name] = Found(Both(0.0, 0.0), 0, first, gib, errors)
    for name, (ms, rounds) in timed(attempts, bench).items():
        warm = found[name]
        assert isinstance(warm, Found)
        found[name] = Found(ms, rounds, warm.first, warm.gib, warm.errors)
    return found


def timed(attempts: dict[str, Attempt], bench: Bench) -> dict[str, tuple[Both, int]]:
    """Times and rounds of each; in turns, so that what slows the machine slows all of them alike."""
    clock = bench.clock
    readings = {name: [clock.time(attempt)] for name, attempt in attempts.items()}
    quick = {name: attempt for name, attempt in attempts.items() if not attempt.slow}
    clock.wait()
    each = sum(sum(readings[name][0]()) for name in quick) / 1e3
    for _ in range(max(3, min(bench.rounds, int(bench.seconds / max(each, 1e-9)))) - 1):
        for name, attempt in quick.items():
            readings[name].append(clock.time(attempt))
    clock.wait()
    pairs = {name: [read() for read in x] for name, x in readings.items()}
    return {
        name: (Both(*(clock.summary(side) for side in zip(*x, strict=True))), len(x))
        for name, x in pairs.items()
    }


def arguments(given: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--budget", type=float, default=480.0, help="seconds; the least important cases go")
    parser.add_argument("--case", default="", help="only cases whose description contains this")
    parser.add_argument("--seconds", type=float, default=1.0, help="to spend on timing a case, if it can")
    parser.add_argument("--rounds", type=int, default=20, help="at most, each contender at each case")
    parser.add_argument("--threads", type=int, default=1, help="of a CPU that nothing else uses")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    return parser.parse_args(given)


def main(given: Sequence[str] | None = None) -> int:
    args = arguments(given)
    start = time.perf_counter()
    # Triton 3.9 warns at a compilation when it is unset
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    device = torch.device(args.device)
    torch.set_num_threads(args.threads)
    every = jobs(device)
    plan = [job for job in every if args.case in str(job.case)]
    if not plan:
        known = "; ".join(dict.fromkeys(str(job.case) for job in every))
        raise SystemExit(f"--case {args.case!r} is in none of: {known}")
    clock: Clock = CudaClock(device) if device.type == "cuda" else CpuClock()
    # the work of the ranks of a ring, on a GPU and among all cases
    ring = RING if device.type == "cuda" and not args.case else 0.0
    bench = Bench(device, clock, contenders(device), start + args.budget - ring, args.seconds, args.rounds)
    settings = {
        "budget_s": args.budget, "case": args.case, "statistic": clock.statistic, "threads": args.threads,
        "load_before": os.getloadavg()[0], "cores": os.cpu_count(), "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    results, unit = Results(), report.UNITS[device.type]
    path = args.out / f"kernels-{report.slug(device)}.json"
    for entry, names in run(bench, plan, results):
        print(*report.table(results, entry, names, unit), "", sep="\n", flush=True)
        settings["seconds"] = round(time.perf_counter() - start, 1)
        settings["load_after"] = os.getloadavg()[0]
        # after each case: a run that is stopped keeps what it found
        report.save(path, report.document(results, device, bench.contenders, settings))
    for dropped in results.dropped:
        print(f"no time for {dropped}")
    if not results.entries:
        raise SystemExit(f"--budget {args.budget} s is too short for any case; 480 does the important ones")
    content = report.document(results, device, bench.contenders, settings)
    report.save(path, content)
    picture = draw(content, path.with_suffix(".png"))
    print(f"wrote {path} and {picture.name} after {settings['seconds']} s")
    failures = results.failures()
    if ring:
        failures += ring_of_ranks(start + args.budget - time.perf_counter())
    for failure in failures:
        print(f"FAILED {failure}")
    return int(bool(failures))


def ring_of_ranks(seconds: float) -> list[str]:
    """Prints what the ranks of a ring compute beside one device; why not, if that is an error."""
    torch.cuda.empty_cache()
    try:
        virtual_ranks.main(["--budget", str(seconds)])
    except TimeoutError as late:
        print(f"virtual ranks: {late}")
    except Exception as error:
        traceback.print_exc()
        return [f"virtual ranks: {type(error).__name__}: {error}"]
    return []


if __name__ == "__main__":
    raise SystemExit(main())
