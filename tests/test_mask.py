"""Masks: each means what tests/masks.py says in plain Python, alone and composed; nonsense is refused."""

from random import Random

import numpy as np
import pytest
import torch

from longspan.kernels.fields import UNLIMITED
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Bound, Causal, Documents, First, Full, Mask, Window
from longspan.kernels.span import Span, Spans, bounds, total
from longspan.kernels.tile import area, needed, tiles
from masks import Phase, matrix, random_mask, random_spans, sees

CPU = torch.device("cpu")
WHOLE = (Span(0, 24),)
ONE_EACH = [
    Full(),
    Causal(),
    Window(5),
    Window(0),
    Window(3, 4),
    Window(None, 2),
    Window(4, None),
    Window(None, None),
    First(0),
    First(6),
    Phase(4),
    Documents((0,)),
    Documents((0, 5, 5, 17)),
    Documents((0, 5, 17), Causal()),
    Documents((0, 5, 17), First(2) | Window(3)),
    Documents((0, 10), Documents((0, 4), Causal())),
    Documents(((0, 5, 24), (0, 9, 11)), Causal()),
]


def check(mask: Mask, q: Spans, k: Spans, heads: int) -> None:
    seen = visible(lower(mask, q, k, heads, CPU))
    batch = mask.batch()
    seen = seen.expand(batch, heads, total(q), total(k))
    for row in range(batch):
        for head in range(heads):
            assert torch.equal(seen[row, head], matrix(mask, q, k, head=head, row=row)), (mask, row, head)


@pytest.mark.parametrize("mask", ONE_EACH, ids=str)
def test_each_mask_means_what_it_says(mask: Mask) -> None:
    check(mask, WHOLE, WHOLE, 2)
    check(mask, (Span(3, 6), Span(18, 5)), (Span(1, 8, 1, 3),), 2)


@pytest.mark.parametrize("seed", range(60))
def test_compositions_mean_what_their_parts_say(seed: int) -> None:
    draw = Random(seed)
    mask = random_mask(draw, 30, batch=draw.choice([1, 3]))
    if draw.random() < 0.5:
        mask = mask.heads(draw.choices(range(5), k=2), of=5)
    check(mask, random_spans(draw, 30), random_spans(draw, 30), 2)


def test_the_meaning_by_hand() -> None:
    """The plain Python of tests/masks.py could share an error with the package; these rows are by hand."""
    rows = {
        Causal(): "1110000",
        Window(1): "0110000",
        Window(0, 2): "0011100",
        First(2): "1100000",
        Documents((0, 2, 4)): "0011000",
        Documents((0, 1, 6), First(2)): "0110000",
        Causal() & First(2): "1100000",
        Window(0) | First(1): "1010000",
    }
    for mask, row in rows.items():
        assert "".join(str(int(sees(mask, 2, k))) for k in range(7)) == row, mask
        assert visible(lower(mask, (Span(2, 1),), (Span(0, 7),), 1, CPU)).flatten().int().tolist() == [
            *map(int, row)
        ]


def test_heads_follow_their_global_index() -> None:
    mask = Phase(4)
    whole = visible(lower(mask, WHOLE, WHOLE, 4, CPU))
    part = visible(lower(mask.heads([3, 1, 1], of=4), WHOLE, WHOLE, 3, CPU))
    assert torch.equal(part, whole[:, [3, 1, 1]])
    assert mask.heads([0, 2, 3], of=4).heads([2, 0], of=3) == mask.heads([3, 0], of=4)
    # composing keeps the binding, on either side
    assert Causal() & mask.heads([1], of=4) == (Causal() & mask).heads([1], of=4)
    assert mask.heads([1], of=4) | Causal() == (mask | Causal()).heads([1], of=4)


def test_documents_takes_tensors_and_lists_and_stays_a_value() -> None:
    for flat in (torch.tensor([0, 3, 9]), [0, 3, 9], (0, 3, 9)):
        assert Documents(flat) == Documents((0, 3, 9))  # type: ignore[arg-type]
    for nested in (torch.tensor([[0, 3], [0, 9]]), [[0, 3], [0, 9]]):
        assert Documents(nested, Causal()) == Documents(((0, 3), (0, 9)), Causal())  # type: ignore[arg-type]
    assert hash(Documents([0, 3])) == hash(Documents((0, 3)))  # type: ignore[arg-type]
    assert Documents((0, 3)).batch() == 1 and Documents(((0, 3), (0, 9))).batch() == 2


def test_integers_of_numpy_and_torch_are_integers() -> None:
    for made, plain in (
        (Window(np.int64(3), torch.tensor(2)), Window(3, 2)),  # type: ignore[arg-type]
        (First(np.int32(3)), First(3)),  # type: ignore[arg-type]
        (Documents(np.array([[0, 3], [0, 9]])), Documents(((0, 3), (0, 9)))),  # type: ignore[arg-type]
        (Documents([np.int64(0), np.int64(4)]), Documents((0, 4))),  # type: ignore[arg-type]
        (Causal().heads(np.array([1]), np.int64(2)), Causal().heads([1], 2)),  # type: ignore[arg-type]
    ):
        assert made == plain and hash(made) == hash(plain) and repr(made) == repr(plain)


def test_equal_masks_are_lowered_once() -> None:
    first = lower(Documents((0, 4), Window(3)), WHOLE, WHOLE, 2, CPU)
    assert lower(Documents([0, 4], Window(3)), (Span(0, 24),), WHOLE, 2, CPU) is first  # type: ignore[arg-type]


BAD = [
    (lambda: Causal() & 3, "can be combined with a mask only, not with 3"),  # type: ignore[operator]
    (lambda: Documents((0, 3), 3), "Documents.inner is 3; it must be a mask or None"),  # type: ignore[arg-type]
    (lambda: Causal().heads((0, 1), 4).heads((-1,), 2), r"kv indices \[-1\] are not heads of 2"),
    (lambda: Causal().heads((0, 1), 4).heads((5,), 2), r"kv indices \[5\] are not heads of 2"),
    (lambda: Window(-1), "Window.left is -1; it must be None or an integer from 0 to"),
    (lambda: Window(1, -2), "Window.right is -2; it must be None or an integer from 0 to"),
    (lambda: Window(2.5), "Window.left is 2.5; it must be None or an integer"),  # type: ignore[arg-type]
    (lambda: First(2.5), f"First.n is 2.5; it must be an integer from 0 to {UNLIMITED}"),  # type: ignore[arg-type]
    (lambda: Documents((0, 2.0)), r"got \(0, 2.0\) \(integers up to"),  # type: ignore[arg-type]
    (lambda: Documents(np.array([[0, 1], [0, 2.5]])), r"got \(0.0, 1.0\)"),  # type: ignore[arg-type]
    (lambda: Documents(torch.tensor([0.0, 3.0])), r"got \(0.0, 3.0\)"),  # type: ignore[arg-type]
    (lambda: Documents((0, UNLIMITED + 1)), rf"got \(0, {UNLIMITED + 1}\) \(integers up to {UNLIMITED}\)"),
    (lambda: Causal().heads([0.5], 2), r"kv indices \[0.5\] are not heads of 2, 0 to 1"),  # type: ignore[list-item]
    (lambda: Window(UNLIMITED), f"Window.left is {UNLIMITED}"),
    (lambda: First(-3), "First.n is -3; it must be an integer from 0"),
    (lambda: Documents(()), r"Documents.offsets must be sorted starts from 0, got \(\)"),
    (lambda: Documents(5), r"sorted starts from 0, got \(5,\)"),  # type: ignore[arg-type]
    (lambda: Documents(None), r"sorted starts from 0, got \(None,\)"),  # type: ignore[arg-type]
    (lambda: Documents(((0, 1), 5)), r"sorted starts from 0, got \(5,\)"),  # type: ignore[arg-type]
    (lambda: Causal().heads(3, 4), r"kv indices \['3'\] are not heads of 4"),  # type: ignore[arg-type]
    (lambda: bounds(WHOLE, 0), "tile is 0; it must be at least 1"),
    (lambda: area(Causal(), WHOLE, WHOLE, 2, tile=0), "tile is 0; it must be at least 1"),
    (lambda: needed(Causal(), WHOLE, WHOLE, 2, tile=-1), "tile is -1; it must be at least 1"),
    (lambda: tiles(Causal(), WHOLE, WHOLE, 2, size=(0, 4), transpose=False, device=CPU), "queries is 0"),
    (lambda: Documents((1, 4)), r"sorted starts from 0, got \(1, 4\)"),
    (lambda: Documents((0, 4, 3)), r"sorted starts from 0, got \(0, 4, 3\)"),
    (lambda: Documents(((0, 4), (0,))), "rows of different lengths; pad them with the length"),
    (lambda: Documents((0, 4), Causal().heads([0], 1)), "bind the whole mask instead"),
    (lambda: Causal().heads([0, 4], of=4), r"kv indices \[4\] are not heads of 4"),
    (lambda: Causal().heads([0, 1], of=4).heads([0], of=3), "of is 3, but the mask is bound to 2 kv heads"),
    (lambda: Causal().heads([0], 2) & Causal().heads([1], 2), "bound to different heads cannot be combined"),
    (lambda: lower(Causal().heads([0], 2), WHOLE, WHOLE, 3, CPU), "bound to 1 kv heads, but k has 3"),
]


@pytest.mark.parametrize(("make", "message"), BAD)
def test_what_makes_no_sense_is_refused(make: object, message: str) -> None:
    assert callable(make)
    with pytest.raises(ValueError, match=message):
        make()


def test_a_mask_of_many_documents_prints_short() -> None:
    mask = Documents(tuple(range(10_000)), Causal()) & Window(5)
    assert len(repr(mask)) < 200
    assert "10000 in 1 row(s), inner=Causal()" in repr(mask)
    assert isinstance(mask.heads([0], 1), Bound) and len(repr(mask.heads([0], 1))) < 250
