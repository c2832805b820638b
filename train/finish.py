"""The end of a run: the last evaluation, the pictures, and the summary."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from ..kernels.mask import Range
from ..kernels.span import Span, bounds
from ..kernels.tile import classify
from .data.needle import Needle
from .job import Job
from .loop import Loop
from .measure import HeldOut, retrieval, text_of
from .measure import bounds as text_bounds
from .pictures import layout_picture, loss_by_position, loss_curve, needle_map
from .progress import amount, duration
from .record import write_json
from .track import Metrics

GRID = 64  # tiles a side in the picture of a mask


def finish(loop: Loop, folder: Path, *, complete: bool) -> dict[str, Any]:
    """Evaluates, draws and sums up; all ranks call it. Gives the summary, which rank 0 also wrote to
    summary.json.
    """
    job, state = loop.job, loop.state
    sent = traffic_matrix(job, loop.sent)
    held = job.data.held_out()
    samples = len(held) if job.cfg.eval.final is None else min(job.cfg.eval.final, len(held))
    found = loop.evaluate(samples) if samples else None
    others: dict[str, float] = {}
    summary: dict[str, Any] = {
        "state": "finished" if complete else "stopped by train.seconds",
        "steps": state.step,
        "tokens": state.tokens,
        "training_seconds": round(state.seconds, 1),
    }
    accuracy = None
    if isinstance(job.data, Needle):
        context = job.data.context
        depths, lengths = (
            (0.0, 0.25, 0.5, 0.75, 1.0),
            [n for n in (context // 4, context // 2, context) if n >= job.data.shortest],
        )
        accuracy = retrieval(job, job.data, depths=depths, lengths=lengths, samples=8)
        summary["retrieval"] = {"depths": depths, "lengths": lengths, "accuracy": accuracy.round(4).tolist()}
    if dist.get_rank() == 0:
        if found:
            text = text_of(held, samples)
            others = {} if isinstance(job.data, Needle) else text_bounds(text)
            summary |= {
                "held_out_bits_per_byte": found.bits_per_byte,
                "held_out_bytes": len(text),
                "same_bytes": others,
            }
        if loop.stepped:  # a finished run that was started again keeps the pictures of its training
            draw(loop, folder, found, sent, others)
        if accuracy is not None:
            path = needle_map(
                folder / "needle.png",
                depths=depths,
                lengths=lengths,
                accuracy=accuracy,
                trained=job.data.context,
            )
            loop.record.picture("needle", path)
        write_json(folder / "summary.json", summary)
    return summary


def draw(loop: Loop, folder: Path, found: HeldOut | None, sent: np.ndarray, others: dict[str, float]) -> None:
    """The run's pictures, in its folder and in the tracker."""
    job = loop.job
    rows = Metrics.read(folder / "metrics.jsonl")
    scale = job.data.bytes_per_token * float(np.log(2))
    rows = [row | {"bits_per_byte": row["loss"] / scale} for row in rows if isinstance(row["loss"], float)]
    made = {"loss": loss_curve(rows, folder / "loss.png", evals=loop.state.evals, bounds=others)}
    length = job.data.context
    placement = job.layout.place(length, job.mask)
    edges, values = found.by_position() if found else ([], [])
    if values:
        ends = sorted(
            {s.last + 1 for spans in placement.spans_by_rank for s in spans if s.contiguous} - {length}
        )
        made["position"] = loss_by_position(edges, values, folder / "position.png", shard_edges=ends[:64])
    runs = [[(s.start, s.length, s.run, s.step) for s in spans] for spans in placement.spans_by_rank]
    made["layout"] = layout_picture(
        folder / "layout.png", spans_by_rank=runs, length=length, tiles=mask_grid(job, length), sent=sent,
        title=f"{type(job.layout).__name__.lower()} over {job.layout.size} rank(s), a layer, both passes",
        mask=repr(job.mask),
    )  # fmt: skip
    for name, path in made.items():
        loop.record.picture(name, path)


def mask_grid(job: Job, length: int) -> np.ndarray:
    """The mask over the whole context as a coarse grid: 0 empty, 1 partial, 2 full."""
    whole = (Span(0, length),)
    tile = Range(*bounds(whole, max(1, -(-length // GRID))))
    some, every = classify(job.mask, tile, tile, job.model.kv_heads)  # type: ignore[arg-type]
    some, every = some[0].any(0), every[0].all(0)
    return np.asarray((some.int() + every.int()).numpy())


def traffic_matrix(job: Job, sent: Mapping[int, int]) -> np.ndarray:
    """Bytes from rank to rank of one sequence, for one layer and one micro batch, forward and backward: int64
    [size, size].
    """
    layers = job.model.layers * job.cfg.train.accumulate
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
    rows = {
        "trained": f"{summary['steps']} steps, {amount(summary['tokens'])} tokens "
        f"in {duration(summary['training_seconds'])}",
        "result": f"{summary['held_out_bits_per_byte']:.3f} bits per held-out byte"
        if "same_bytes" in summary
        else "",
        "same bytes": ", ".join(
            f"{name} {value:.2f}" for name, value in summary.get("same_bytes", {}).items()
        ),
        "pictures": ", ".join(sorted(p.name for p in folder.glob("*.png"))),
        "run folder": str(folder),
        "look closer": f"longspan evaluate run.dir={folder}",
        "try it": f"longspan sample run.dir={folder} prompt='def main('",
    }
    return {name: text for name, text in rows.items() if text}
