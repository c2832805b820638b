"""Every layout equals one device, whatever the mask, heads, length, packing and placement."""

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from itertools import cycle, product
from pathlib import Path
from typing import Any

import pytest
import torch

import cells
import confs
import layout_table
from cells import Errors, errors, ran
from longspan.kernels import cpu, reference
from longspan.kernels.attention import AttentionOptions, chosen
from longspan.kernels.heads import Composed, PerHead
from longspan.kernels.mask import And, Bound, Documents, Mask, Or, Unsupported
from matrix import (
    FAMILIES,
    HEADS,
    LAYOUTS,
    LENGTHS,
    PACKINGS,
    STARS,
    VARIANTS,
    Point,
    covering,
    pack,
    pairs,
    points,
)
from world import Worlds

ROOT = Path(__file__).parent.parent
SIZES = (2, 3, 4, 8)
# Relative norms over a tensor: of values, of gradients. Half precision rounds each of them once.
LIMITS = {
    torch.float64: (1e-10, 1e-10),
    torch.float32: (1e-5, 5e-5),
    torch.bfloat16: (3e-3, 3e-3),
    torch.float16: (4e-4, 4e-4),
}
# What is rounded in half precision errs with the norm of its token, which may be several times the mean.
LARGE = 8
AT_ONCE = 50
COVERING = covering()


def check(
    world: Worlds,
    size: int,
    wanted: Sequence[Point],
    dtype: torch.dtype = torch.float64,
    options: AttentionOptions | None = None,
) -> None:
    """Runs the points on `size` ranks; of the first AT_ONCE with any, all that miss the limits are named."""
    for first in range(0, len(wanted), AT_ONCE):
        some = wanted[first : first + AT_ONCE]
        wanted_cells = [point.cell(dtype, options) for point in some]
        results = world(size)(ran, wanted_cells, size)
        found = [(p, errors(c, ranks)) for p, c, *ranks in zip(some, wanted_cells, *results, strict=True)]
        bad = [f"{point}: {each}" for point, each in found if not within(each, dtype)]
        assert not bad, f"P={size}, after {first} of {len(wanted)} points:\n" + "\n".join(bad)


def within(found: Errors, dtype: torch.dtype) -> bool:
    """Whether the error of each tensor is, and that of its worst token."""
    values, gradients = LIMITS[dtype]
    half = dtype.itemsize == 2
    for name, error in found.items():
        limit = gradients if name[0] == "d" else values
        if half and name.startswith("lse"):
            limit = LIMITS[torch.float32][0]
        elif half and name.endswith("token"):
            limit *= LARGE
        if error > limit:
            return False
    return True


@pytest.mark.parametrize("size", [1, *SIZES])
def test_layouts_equal_one_device(world: Worlds, size: int) -> None:
    # all of them: test_by_twos
    check(world, size, COVERING[: {2: 160, 3: 80, 8: 16}.get(size, 24)])


def test_layouts_equal_one_device_in_float32(world: Worlds) -> None:
    check(world, 3, covering(seed=1)[:24], torch.float32)


def test_sigmoid_and_softcap(world: Worlds) -> None:
    wanted = covering(seed=2)[:28]
    check(world, 3, wanted[::2], options=AttentionOptions(normalizer="sigmoid", bias=-4.0))
    check(world, 2, wanted[1::2], options=AttentionOptions(softcap=2.0))


def test_several_tiles_a_rank(world: Worlds) -> None:
    turns = cycle(("causal", "s2", "sinks", "per_head"))
    wanted = [p._replace(mask=next(turns), length=401) for p in COVERING if p.layout != "star"][:24]
    check(world, 2, wanted)


@pytest.mark.slow
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_whole_product(world: Worlds, size: int, heads: tuple[int, int]) -> None:
    # auto is one of the other placements; rows of their own are tried by twos
    every = [p for p in points() if p.placement != "auto" and p.packing != "by row"]
    check(world, size, [p for p in every if p.heads == heads])


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_by_twos(world: Worlds, size: int) -> None:
    check(world, size, COVERING)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("size", SIZES)
def test_other_dtypes_by_twos(world: Worlds, size: int, dtype: torch.dtype) -> None:
    check(world, size, covering(seed=size), dtype)


def refused(rank: int, size: int) -> list[str]:
    """Names of what star refuses to place here."""
    layout, found = cells.build("star", size), []
    for mask, packing in product(FAMILIES, PACKINGS):
        try:
            layout.place(61, pack(FAMILIES[mask](4), packing, 61))
        except Unsupported as error:
            assert "parallel=s2" in str(error)
            found.append(f"star {mask} {packing}")
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_what_is_refused_by_name(world: Worlds, size: int) -> None:
    """Only star refuses: all other points of the product are run above."""
    expected = [
        f"star {mask} {packing}"
        for mask, packing in product(FAMILIES, PACKINGS)
        if mask not in STARS or packing != "one"
    ]
    assert world(size)(refused, size) == [expected] * size
    assert len(expected) == 3 * len(FAMILIES) - len(STARS)


def test_only_star_refuses_and_the_docs_say_so() -> None:
    found = layout_table.table()
    lines = [line.split(" | ") for line in found.splitlines()[2:]]
    assert len(lines) == len(FAMILIES)
    assert all(line[1:-1] == ["yes"] * (len(LAYOUTS) - 1) for line in lines)
    assert layout_table.written() == found, "write what `python tests/layout_table.py` prints"


def backends(rank: int, size: int, names: Sequence[str]) -> list[dict[str, int]]:
    """How often each backend ran for a layout, softmax and then sigmoid."""
    found = []
    for name, options in product(names, (AttentionOptions(), AttentionOptions(normalizer="sigmoid"))):
        count: Counter[str] = Counter()
        with pytest.MonkeyPatch.context() as patch:
            for module, half in product((cpu, reference), ("forward", "backward")):
                patch.setattr(module, half, counting(getattr(module, half), count))
            cells.ran(rank, [cells.Cell(name, FAMILIES["star"](2), (4, 2), 61, options=options)], size)
        found.append(dict(count))
    return found


def counting(real: Callable[..., Any], count: "Counter[str]") -> Callable[..., Any]:
    def counted(*args: Any) -> Any:
        count[real.__module__.rpartition(".")[2]] += 1
        return real(*args)

    return counted


def test_the_backend_that_auto_chose_is_the_one_that_runs(world: Worlds) -> None:
    q = torch.zeros(1, 1, 1, 8)
    names = ["ring/zigzag", "gather/zigzag", "ulysses", "usp/zigzag", "s2/contiguous", "star"]
    for found in world(3)(backends, 3, names):
        assert all(count.keys() == {chosen(q)} == {"cpu"} for count in found[::2]), found
        sigmoid = AttentionOptions(normalizer="sigmoid")
        assert all(count.keys() == {chosen(q, sigmoid)} == {"reference"} for count in found[1::2]), found


def test_all_levels_meet_by_twos() -> None:
    met = {pair for point in COVERING for pair in pairs(point)}
    possible = {pair for point in points(LAYOUTS + VARIANTS) for pair in pairs(point)}
    assert met == possible
    assert len(COVERING) <= 300
    # said without the generator: some of what must be among them
    for kind, levels in (("mask", FAMILIES), ("length", LENGTHS), ("packing", PACKINGS)):
        assert all(
            {(("heads", h), (kind, x)), ((kind, x), ("heads", h))} & met for h in HEADS for x in levels
        )
    assert {p.layout for p in COVERING[:40]} == {*LAYOUTS, *VARIANTS}
    assert len({p.mask for p in COVERING[:40]}) >= len(FAMILIES) - 2


def parts(mask: Mask) -> list[Mask]:
    """The mask and all that it is made of."""
    match mask:
        case And(left, right) | Or(left, right):
            inner = [left, right]
        case Bound(mask=one) | Documents(inner=Mask() as one):
            inner = [one]
        case PerHead(each):
            inner = list(each)
        case Composed():
            inner = [mask.parts(4)]
        case _:
            inner = []
    return [mask, *(found for one in inner for found in parts(one))]


def test_every_mask_of_the_package_is_tried() -> None:
    tried = {type(m) for make in FAMILIES.values() for m in parts(make(4))} | {Documents}
    written = set()
    for file in (ROOT / "kernels").glob("*.py"):
        module = importlib.import_module(f"longspan.kernels.{file.stem}")
        own = [x for x in vars(module).values() if isinstance(x, type) and x.__module__ == module.__name__]
        written |= {x for x in own if issubclass(x, Mask)}
    assert {x.__name__ for x in written - tried} == {"Mask", "Leaf", "Composed", "_Pair"}


def test_every_mask_yaml_is_tried() -> None:
    load = pytest.importorskip("omegaconf").OmegaConf.load
    for file in (ROOT / "conf" / "mask").glob("*.yaml"):
        written = load(file)
        if based := written.get("defaults"):
            # other numbers for another file's mask
            assert based[0] in FAMILIES
            continue
        assert file.stem in FAMILIES, f"tests/matrix.py has no mask like {file.name}"
        like = FAMILIES[file.stem](4)
        mask = confs.made(written)
        assert [type(m) for m in parts(mask)] == [type(m) for m in parts(like)], file.name
