"""Faults around a run: a tracker that never answers, a port that is taken, a job that is queued again and
again.
"""

import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from ..train.entry import FAILED
from . import requeue
from .chaos_bench import Bench, Life, Promise
from .chaos_fault import KILLED, Fault
from .chaos_row import Row

HERE = "127.0.0.1"
RESTARTS = 1


@contextmanager
def mute() -> Iterator[int]:
    """The port of a server that takes connections and never answers."""
    with socket.socket() as door:
        door.bind((HERE, 0))
        door.listen(64)
        yield door.getsockname()[1]


def tracker(fault: Fault, bench: Bench) -> Row:
    with mute() as port:
        env = {
            "WANDB_BASE_URL": f"http://{HERE}:{port}", "WANDB_API_KEY": "0" * 40, "WANDB_SILENT": "true",
            "no_proxy": HERE,
        }  # fmt: skip
        life = bench.life(fault.name, "track=wandb", "track.mode=online", env=env)
    answer = "training goes on; at the end W&B is waited for 20 s"
    promise = Promise((0,), "wandb .*metrics.jsonl has everything")
    return bench.row(fault.name, fault.what, answer, [life], promise)


def port(fault: Fault, bench: Bench) -> Row:
    with mute() as taken:
        launch = ("--nnodes=1", "--node-rank=0", f"--master-addr={HERE}", f"--master-port={taken}")
        life = bench.life(fault.name, launch=launch)
    promise = Promise((FAILED,), "the ranks cannot meet: .*address already in use", equal=None)
    return bench.row(fault.name, fault.what, "refused before a rank starts", [life], promise)


def stuck(fault: Fault, bench: Bench) -> Row:
    """What the batch script asks before and after each start, around a job that never comes to a save."""
    run = bench.run(fault.name)
    run.mkdir(parents=True)
    lives: list[Life] = []
    said = ""
    try:
        while len(lives) < 9:
            requeue.start(run, "1", RESTARTS, [])
            lives.append(bench.life(fault.name, strike=bench.strike(fault.name, "kill", "forward", 2)))
            requeue.end(run, lives[-1].code, RESTARTS)
    except requeue.Stop as stop:
        said = str(stop)
    answer = f"stopped after {len(lives)} starts"
    promise = Promise(KILLED, equal=None, lost=1)
    row = bench.row(fault.name, fault.what, answer, lives, promise, lost=0)
    # that the last one is killed as well is the fault
    wrong = [life.code for life in lives if life.code not in KILLED]
    broken = f"exit codes {wrong}" if wrong else "" if len(lives) == RESTARTS + 1 else f"{len(lives)} starts"
    return replace(row, said=said, broken=broken)


OUTSIDE = (
    Fault("tracker", "the W&B server takes connections and never answers", tracker),
    Fault("port", "the port where the ranks meet is taken", port),
    Fault("requeue", f"a SLURM job that is killed before each save, slurm.restarts={RESTARTS}", stuck),
)
