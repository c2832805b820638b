"""Samples of a job's model: what is asked for, and each rank's part of it."""

from collections import Counter
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch.distributed as dist

from ..models.patch import unpatchify
from .data.clip import Clip, Clips, Shape
from .diffusion.batch import grid_of, grids_of, token_shape, volume
from .diffusion.generate import Request, generate
from .diffusion.ruler import Array, Sampled
from .diffusion.samplers import Ancestral, Sampler
from .diffusion.text import Text
from .job import Job
from .measure import autocast
from .objective.denoise import Denoise

# Samples of a request, and tokens: nothing depends on it.
AT_ONCE, TOKENS = 100, 65_536


def denoise_of(job: Job) -> Denoise:
    """The objective, of a job that trains a diffusion model."""
    assert isinstance(job.objective, Denoise)
    return job.objective


def check_sampling(objective: Denoise, sampler: Sampler, guidance: float) -> None:
    """ValueError for a sampler or a guidance that does not go with how the model is trained."""
    sampler.check(objective.process)
    model = objective.model
    learns = model.out_channels > model.channels
    if isinstance(sampler, Ancestral) and sampler.variance == "learned" and not learns:
        raise ValueError("sampler variance is 'learned', but model.learn_sigma is false: take posterior")
    if guidance == 1.0:
        return
    if not objective.dropout:
        raise ValueError(
            f"guidance is {guidance:g}, but objective.dropout is 0, so that the model never learns what no "
            f"condition is: set objective.dropout to 0.1, or guidance to 1"
        )
    if model.classes is None and model.text_dim is None:
        raise ValueError(f"guidance is {guidance:g}, but the model has no condition to guide by: set it to 1")


def draw(
    job: Job, sampler: Sampler, count: int, guidance: float, labels: Sequence[int] = (),
    size: Sequence[int] | None = None,
) -> Sampled:  # fmt: skip
    """`count` samples of the present weights, of all classes in turn or of these labels; whole on every rank.
    A model with texts is given those of held-out clips, with their classes. size: another than `model.size`.

    Each dp rank makes a part; the noise of sample i is a function of the seed and i.
    """
    shape, patch = shape_of(job, size), job.model.patch
    wanted, clips = asked(job.data, count, labels)
    most = max(1, min(AT_ONCE, TOKENS // token_shape(shape, patch)[0]))
    parts: dict[int, Array] = {}
    starts = range(0, count, most)
    for turn in range(job.dp_rank, -(-len(starts) // job.dp) * job.dp, job.dp):
        # weights may be gathered over dp: who has no part left makes the last one again
        first = starts[min(turn, len(starts) - 1)]
        grids = grids_of(shape, patch, job.model.grid)
        request = Request(
            wanted[first : first + most], token_shape(shape, patch), job.data.classes, shape[0],
            seed=job.cfg.seed, first=first, guidance=guidance,
            text=Text.of(clips[first : first + most]) if clips else None,
            grids=grids, bricks=denoise_of(job).bricks(grids),
        )  # fmt: skip
        with autocast(job):
            tokens = generate(
                denoise_of(job), sampler, request, layout=job.layout, mask=job.mask, device=job.device
            )
        if turn < len(starts):
            parts[first] = unpatchify(tokens, grid_of(shape, patch), volume(patch)).float().numpy()
    if job.dp > 1:
        each: list[dict[int, Array]] = [{} for _ in range(job.dp)]
        dist.all_gather_object(each, parts, group=job.mesh["dp"].get_group())
        parts = {first: clips for found in each for first, clips in found.items()}
    return Sampled(guidance, np.concatenate([parts[first] for first in sorted(parts)]), wanted)


def shape_of(job: Job, size: Sequence[int] | None) -> Shape:
    """Of a sample: channels, frames, height, width. ValueError for a size that cannot be."""
    model = job.model
    steps = tuple(model.patch)
    if size is None:
        size = [n * p for n, p in zip(model.grid, steps, strict=True)]
    if len(size) != len(steps) or any(n < p or n % p for n, p in zip(size, steps, strict=True)):
        raise ValueError(
            f"size is {list(size)}; it needs a multiple of model.patch {list(steps)} for each of its axes"
        )
    frames, height, width = (1, *size)[-3:]
    return model.channels, frames, height, width


def asked(data: Clips, count: int, labels: Sequence[int]) -> tuple[tuple[int, ...], list[Clip]]:
    """The classes of samples, and the held-out clips whose texts they are made of; none without texts.

    ValueError if no held-out clip has a label.
    """
    wanted = tuple(labels[i % len(labels)] if labels else i % data.classes for i in range(count))
    if data.traits.text is None:
        return wanted, []
    held = data.held_out()
    if not labels:
        clips = [held.item(i % len(held)) for i in range(count)]
        return tuple(clip.label for clip in clips), clips
    by_label: dict[int, list[Clip]] = {}
    for label in set(labels):
        each = (clip for clip in map(held.item, range(len(held))) if clip.label == label)
        by_label[label] = list(islice(each, wanted.count(label)))
        if not by_label[label] and label in wanted:
            raise ValueError(f"labels holds {label}, but no held-out clip of that class gives its text")
    turns: Counter[int] = Counter()
    chosen = []
    for label in wanted:
        chosen.append(by_label[label][turns[label] % len(by_label[label])])
        turns[label] += 1
    return wanted, chosen
