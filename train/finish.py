"""The end of a run: the last evaluation, the pictures, and the summary."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..kernels.mask import Range
from ..kernels.span import Span, bounds
from ..kernels.tile import classify
from .guard import FAULTS
from .job import Job
from .loop import Loop
from .pictures import layout_picture
from .progress import amount, duration
from .record import write_json, write_whole
from .report.page import NAME

GRID = 64  # tiles a side in the picture of a mask
LAST = ("look closer", "try it")  # what to do next stands at the end


def finish(loop: Loop, folder: Path, *, complete: bool) -> dict[str, Any]:
    """Evaluates, draws and sums up; all ranks call it. Gives the summary, which rank 0 also wrote to
    summary.json.
    """
    job, state = loop.job, loop.state
    loop.pulse.enter("evaluate")
    sent = traffic_matrix(job, loop.sent)
    held = len(job.data.held_out())
    samples = held if job.cfg.eval.final is None else min(job.cfg.eval.final, held)
    summary: dict[str, Any] = {
        "state": "finished" if complete else "stopped by train.seconds",
        "steps": state.step,
        "tokens": state.tokens,
        "training_seconds": round(state.seconds, 1),
    }
    bad = {"skipped_steps": state.skipped, "rewinds": state.rewound}
    summary |= bad if any(bad.values()) else {}
    with job.averaged():
        summary |= loop.judge.finish(loop, folder, samples)
    if dist.get_rank() == 0:
        if loop.stepped:  # a finished run that was started again keeps the pictures of its training
            draw_layout(loop, folder, sent)
        write_json(folder / "summary.json", summary)
    return summary


def draw_layout(loop: Loop, folder: Path, sent: np.ndarray) -> None:
    """Who holds what, the mask, and what travels."""
    job = loop.job
    length = job.context
    placement = job.objective.placement(job.data, job.layout, job.mask)
    runs = [[(s.start, s.length, s.run, s.step) for s in spans] for spans in placement.spans_by_rank]
    tiles, mask = mask_grid(job, length), repr(job.mask)
    title = f"{type(job.layout).__name__.lower()} over {job.layout.size} rank(s), a layer, both passes"
    rows = ["".join(map(str, row)) for row in tiles.tolist()]
    drawn = {"title": title, "mask": mask, "length": length, "spans": runs, "tiles": rows}
    write_whole(folder / "layout.json", json.dumps(drawn | {"sent": sent.tolist()}) + "\n")
    path = layout_picture(
        folder / "layout.png", spans_by_rank=runs, length=length, tiles=tiles, sent=sent, title=title,
        mask=mask,
    )  # fmt: skip
    loop.record.picture("layout", path)


def mask_grid(job: Job, length: int) -> np.ndarray:
    """The mask over the whole context as a coarse grid: 0 empty, 1 partial, 2 full."""
    whole = (Span(0, length),)
    tile = Range(*bounds(whole, max(1, -(-length // GRID))))
    some, every = classify(job.mask, tile, tile, job.model.kv_heads)
    some, every = some[0].any(0), every[0].all(0)
    return np.asarray((some.int() + every.int()).numpy())


def traffic_matrix(job: Job, sent: Mapping[int, int]) -> np.ndarray:
    """Bytes from rank to rank of one sequence, for one layer and one micro batch, forward and backward: int64
    [size, size].
    """
    layers = len(job.model.masks) * job.cfg.train.accumulate
    row = torch.zeros(job.layout.size, dtype=torch.int64)
    for peer, count in sent.items():
        row[peer] = count // layers
    if job.layout.group is None:
        return np.asarray(row[None].numpy())
    rows = [torch.empty_like(row) for _ in range(job.layout.size)]
    dist.all_gather(rows, row.to(rows[0].device), group=job.layout.group)
    return np.asarray(torch.stack(rows).numpy())


def headline(loop: Loop, summary: dict[str, Any], folder: Path) -> dict[str, str]:
    """The summary for people."""
    told = loop.judge.headline(summary, folder)
    rows = {
        "trained": f"{summary['steps']} steps, {amount(summary['tokens'])} tokens "
        f"in {duration(summary['training_seconds'])}",
        "bad steps": f"{summary['skipped_steps']} skipped, {summary['rewinds']} rewinds: {folder / FAULTS}"
        if "rewinds" in summary
        else "",
        **{name: told[name] for name in told if name not in LAST},
        "pictures": ", ".join(sorted(p.name for p in folder.glob("*.png"))),
        "report": str(folder / NAME) if loop.job.cfg.report else "",
        "run folder": str(folder),
        **{name: told[name] for name in told if name in LAST},
    }
    return {name: text for name, text in rows.items() if text}
