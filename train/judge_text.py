"""What a language model is worth: bits per held-out byte beside other means, loss by position, retrieval."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist

from .data.needle import Needle
from .job import Job
from .loop import Loop
from .measure import HeldOut, bounds, held_out_loss, retrieval, text_of
from .metrics import Metrics
from .pictures import loss_by_position, loss_curve, needle_map

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
PROBES = 8  # needles at each depth and length


class TextJudge:
    """Held-out text by the byte, and needles if there are any."""

    def held_out(self, job: Job, samples: int) -> dict[str, float]:
        return _row(held_out_loss(job, job.data.held_out(), samples))

    def words(self, row: Mapping[str, float]) -> str:
        return f"{row['bits_per_byte']:.3f} bits per byte"

    def show(self, job: Job, folder: Path, step: int) -> dict[str, Path]:
        return {}

    def facts(self, job: Job) -> str:
        told = job.data.describe()
        known = [f"{job.context} tokens a sequence"]
        if "documents" in told:
            known.insert(0, f"{told['documents']} documents")
        if "padding" in told:
            known.append(f"padding {100 * float(told['padding']):.2f}%")
        if "bad" in told:
            known.append(f"{told['bad']} bad records")
        return f"{told.get('corpus', '?')}: {', '.join(known)}"

    def finish(self, loop: Loop, folder: Path, samples: int) -> dict[str, Any]:
        job, summary, others = loop.job, dict[str, Any](), dict[str, float]()
        held = job.data.held_out()
        found = held_out_loss(job, held, samples) if samples else None
        if found:
            loop.evaluated(_row(found))
        if found and dist.get_rank() == 0:
            text = text_of(held, samples)
            others = {} if isinstance(job.data, Needle) else bounds(text)
            summary = {
                "held_out_bits_per_byte": found.bits_per_byte, "held_out_bytes": len(text),
                "same_bytes": others,
            }  # fmt: skip
        if loop.stepped and dist.get_rank() == 0:
            _draw(loop, folder, found, others)
        if isinstance(job.data, Needle):
            summary["retrieval"] = _retrieval(loop, job.data, folder)
        return summary

    def headline(self, summary: Mapping[str, Any], folder: Path) -> dict[str, str]:
        found = "same_bytes" in summary
        others = summary.get("same_bytes", {})
        return {
            "result": f"{summary['held_out_bits_per_byte']:.3f} bits per held-out byte" if found else "",
            "same bytes": ", ".join(f"{name} {value:.2f}" for name, value in others.items()),
            "look closer": f"longspan evaluate run.dir={folder}",
            "try it": f"longspan sample run.dir={folder} prompt='def main('",
        }


def _row(found: HeldOut) -> dict[str, float]:
    return {"eval_loss": found.loss, "bits_per_byte": found.bits_per_byte}


def _draw(loop: Loop, folder: Path, found: HeldOut | None, others: Mapping[str, float]) -> None:
    """The loss over training, and by position with the borders of the shards."""
    job = loop.job
    scale = job.data.bytes_per_token * float(np.log(2))
    rows = [
        row | {"bits_per_byte": row["loss"] / scale}
        for row in Metrics.read(folder / "metrics.jsonl")
        if isinstance(row["loss"], float)
    ]
    loop.record.picture("loss", loss_curve(rows, folder / "loss.png", evals=loop.state.evals, bounds=others))
    edges, values = found.by_position() if found else ([], [])
    if values:
        length = job.data.context
        spans = (s for spans in job.layout.place(length, job.mask).spans_by_rank for s in spans)
        ends = sorted({s.last + 1 for s in spans if s.contiguous} - {length})
        path = loss_by_position(edges, values, folder / "position.png", shard_edges=ends[:64])
        loop.record.picture("position", path)


def _retrieval(loop: Loop, data: Needle, folder: Path) -> dict[str, Any]:
    lengths = [n for n in (data.context // 4, data.context // 2, data.context) if n >= data.shortest]
    accuracy = retrieval(loop.job, data, depths=DEPTHS, lengths=lengths, samples=PROBES)
    if dist.get_rank() == 0:
        path = needle_map(
            folder / "needle.png", depths=DEPTHS, lengths=lengths, accuracy=accuracy, trained=data.context
        )
        loop.record.picture("needle", path)
    return {"depths": DEPTHS, "lengths": lengths, "accuracy": accuracy.round(4).tolist()}
