"""Whether a diffusion model, its objective and its data belong together: asked before the first step."""

from typing import Any, Protocol

from ...models.grids import on_grid
from ..data.clip import Clips
from ..objective.ddpm import Diffusion
from ..objective.process import Process
from .batch import grid_of


class Settings(Protocol):
    """What is asked of an objective, see `Denoise`."""

    model: Any
    process: Process
    labels: bool
    per_frame: bool
    brick: tuple[int, ...] | None


def check_fit(objective: Settings, data: Clips) -> None:
    """ValueError naming the settings that do not fit each other, and what would."""
    _sizes(objective, data)
    _conditions(objective, data)
    model, brick = objective.model, objective.brick
    if model.out_channels != model.channels and not isinstance(objective.process, Diffusion):
        raise ValueError("model.learn_sigma is true, which only objective=ddpm trains: set it to false")
    if brick is not None and (len(brick) != len(model.grid) or min(brick) < 1):
        raise ValueError(
            f"objective.brick is {list(brick)}; it needs a number of at least 1 for each axis of the grid "
            f"{list(model.grid)}"
        )


def _sizes(objective: Settings, data: Clips) -> None:
    model, traits = objective.model, data.traits
    several = traits.buckets is not None or traits.pack is not None
    if len(traits.shapes) > 1 and not several:
        raise ValueError(
            f"the data has clips of {len(traits.shapes)} shapes, such as {traits.shapes[0]} and "
            f"{traits.shapes[-1]}: set data.buckets to the tokens of a batch, or data.pack to those of a row"
        )
    for shape in traits.shapes:
        grid, own = grid_of(shape, model.patch), tuple(model.grid)
        here = grid[-len(own) :]
        # an image model takes one frame, and a smaller clip lies in a corner of the grid
        fits = grid[: -len(own)] in ((), (1,)) and (
            here == own or (several and all(a <= b for a, b in zip(here, own, strict=True)))
        )
        for name, known, found, right in (
            ("size", own, grid if grid[: -len(own)] not in ((), (1,)) else here, fits),
            ("channels", model.channels, shape[0], model.channels == shape[0]),
        ):
            if not right:
                raise ValueError(
                    f"model.{name} gives {known}, but the data has {found} (its clips are {shape}: channels, "
                    f"frames, height, width): set model.{name} to fit"
                )
    _packed(objective, data)


def _packed(objective: Settings, data: Clips) -> None:
    model, traits = objective.model, data.traits
    if traits.pack is None:
        return
    for wrong, said in (
        (traits.text is not None, "the data has texts, which go with whole rows: take data.buckets"),
        (objective.per_frame, "objective.per_frame is true: set it to false, or take data.buckets"),
        (objective.brick is not None, "objective.brick is set: set it to null, or take data.buckets"),
        (any(map(on_grid, model.masks)), "the mask is about a grid, which a row is not: take data.buckets"),
    ):
        if wrong:
            raise ValueError(f"data.pack is {traits.pack}, but {said}")


def _conditions(objective: Settings, data: Clips) -> None:
    model, traits = objective.model, data.traits
    if objective.labels and model.classes != data.classes:
        more = ", or objective.labels=false" if model.classes is None else ""
        raise ValueError(
            f"model.classes gives {model.classes}, but the data has {data.classes} classes: set "
            f"model.classes to fit{more}"
        )
    if not objective.labels and model.classes is not None:
        raise ValueError(
            f"objective.labels is false, but model.classes is {model.classes}: a model with classes needs "
            f"them; set labels to true, or take a model with classes=null"
        )
    for name, own, there in (
        ("text_dim", model.text_dim, traits.text),
        ("pooled_dim", model.pooled_dim, traits.pooled),
    ):
        if own != there:
            what = "texts" if name == "text_dim" else "pooled texts"
            found = f"has no {what}" if there is None else f"has {what} of width {there}"
            rest = "" if there is None else ", or leave them out with data.text=false"
            raise ValueError(
                f"model.{name} is {'null' if own is None else own}, but the data {found}: set model.{name} "
                f"to fit{rest}"
            )
