"""A model's masks by layer: together the heads see the whole context; presets serve models of any size."""

from collections.abc import Iterable
from pathlib import Path
from random import Random

import pytest
import torch

import confs
from longspan.kernels.heads import Heads, PerHead
from longspan.kernels.layers import PerLayer, _at_layers, layered
from longspan.kernels.lower import lower, visible
from longspan.kernels.mask import Bound, Causal, Documents, First, Full, Mask, Window
from longspan.kernels.neighborhood import Neighborhood
from longspan.kernels.patterns import Shifted, Strided
from longspan.kernels.span import Span

CPU = torch.device("cpu")
ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("kv_heads", "layers", "stride"), [(16, 1, 16), (8, 2, 16), (4, 4, 16), (2, 3, 6), (4, 1, 3), (1, 5, 5)]
)
def test_the_heads_of_all_layers_see_the_whole_context(kv_heads: int, layers: int, stride: int) -> None:
    mask = Strided(2, 1, stride)
    assert mask.coverage(kv_heads, layers)
    assert layers == 1 or not mask.coverage(kv_heads, layers - 1)
    at = (Span(0, 4 * stride),)
    masks = layered(mask & Causal(), layers, kv_heads)
    assert len(masks) == layers
    # as tensor parallelism or Ulysses would split the heads
    shards = [list(range(kv_heads))[r::2] or [0] for r in range(2)]
    bound = (Bound(m, tuple(shard), kv_heads) for m in masks for shard in shards)
    parts = (
        visible(lower(m, at, at, len(shard), CPU)) for m, shard in zip(bound, shards * layers, strict=True)
    )
    union = torch.stack([x.any(1)[0] for x in parts]).any(0)
    assert torch.equal(union, torch.ones_like(union).tril())


def test_layers_shift_each_strided_mask_wherever_it_stands() -> None:
    strided = Strided(4, 1, 4, offset=2)
    first, second, third = (
        Documents((0, 9), (PerHead((strided, Full())) | First(2)) & m) for m in (Causal(),) * 3
    )
    assert (first,) * 3 == layered(first, 3, 2)[::2] + (third,)
    assert layered(first, 2, 2)[1] == Documents(
        (0, 9), (PerHead((Strided(4, 1, 4, offset=3), Full())) | First(2)) & Causal()
    )
    assert second == first
    for mask in (Causal(), Window(5) | First(2), Documents((0, 7))):
        assert layered(mask, 3, 2) == (mask,) * 3


@pytest.mark.parametrize(
    "mask",
    [
        Strided(4, 1, 16, dense_heads=1) & Causal(),
        (Strided(4, 1, 16) | Heads(0, 1)) & Causal(),
        PerHead((Causal(), Strided(4, 1, 16))),
        Documents((0, 9), PerHead((Strided(4, 1, 16), Window(None, 5)))),
        Strided(4, 1, 1),
    ],
    ids=str,
)
def test_a_dense_head_is_enough(mask: Mask) -> None:
    assert len(layered(mask, 2, 2)) == 2


@pytest.mark.parametrize(
    ("mask", "layers", "message"),
    [
        (
            Strided(4, 1, 16) & Causal(),
            2,
            "2 of 2 kv heads in 2 layers leave 12 of every 16 blocks unseen.*stride=4",
        ),
        (Documents((0, 9), Window(9) | Strided(4, 1, 5)), 8, "leave 1 of every 5 blocks unseen.*stride=4"),
        (
            PerHead((Strided(4, 1, 2), Window(3))),
            4,
            "1 of 2 kv heads in 4 layers leave 1 of every 2 .*stride=1",
        ),
    ],
)
def test_a_model_that_leaves_blocks_unseen_is_refused(mask: Mask, layers: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        layered(mask, layers, 2)


def composed(turn: Random, depth: int) -> Mask:
    """Of strided masks without near blocks, whose visibility is the same for every query."""
    pick = turn.randrange(6 if depth else 1)
    if pick == 1:
        return composed(turn, depth - 1) & composed(turn, depth - 1)
    if pick == 2:
        return composed(turn, depth - 1) | composed(turn, depth - 1)
    if pick == 3:
        return PerHead((composed(turn, depth - 1), composed(turn, depth - 1)))
    if pick == 4:
        return Heads(turn.randrange(2), 2) & composed(turn, depth - 1)
    if pick == 5:
        return PerLayer(composed(turn, 0), composed(turn, 0), turn.choice((2, 3)))
    block, stride, offset = turn.choice((2, 3)), turn.choice((2, 3, 4)), turn.randrange(4)
    return Strided(block, 0, stride, offset=offset, dense_heads=turn.randrange(12) // 11)


def sees_all(masks: Iterable[Mask]) -> bool:
    """Whether each of 72 keys is seen by a head of any of these layers."""
    at = (Span(0, 72),)
    seen = [visible(lower(m, at, at, 2, CPU)).expand(1, 2, 72, 72)[0].any(0)[0] for m in masks]
    return bool(torch.stack(seen).any(0).all())


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("listed", [False, True], ids=["one mask", "a list"])
def test_only_models_that_leave_blocks_unseen_are_refused(layers: int, listed: bool) -> None:
    turn, refused, n = Random(layers), 0, 120
    for _ in range(n):
        mask = [composed(turn, 2) for _ in range(layers)] if listed else composed(turn, 2)
        try:
            layered(mask, layers, 2)
            whole = True
        except ValueError as error:
            assert "blocks unseen" in str(error)
            whole, refused = False, refused + 1
        # what the layers would be, were they not checked
        each = tuple(mask) if isinstance(mask, list) else _at_layers(mask, layers, 2)
        assert whole == sees_all(each), mask
    assert 0.1 * n < refused < 0.9 * n


def test_the_stride_that_is_named_leaves_none_unseen() -> None:
    def either(stride: int) -> Mask:
        return (Strided(4, 1, stride) | Strided(4, 1, stride, offset=1)) & Causal()

    with pytest.raises(ValueError, match="leave 4 of every 10 blocks unseen; stride=6 or dense_heads=1"):
        layered(either(10), 2, 2)
    assert len(layered(either(6), 2, 2)) == 2


def test_strides_that_cannot_be_compared_are_refused() -> None:
    far = Strided(1, 0, 2**20 - 3) | Strided(1, 0, 2**20 - 5)
    with pytest.raises(ValueError, match="too many to compare; choose blocks and strides"):
        layered(far, 2, 2)
    assert len(layered(far | Causal(), 2, 2)) == 2


def test_layers_and_heads_that_cannot_be_are_refused() -> None:
    for made, message in (
        (lambda: layered(Causal(), 0, 2), "layers is 0; it must be at least 1"),
        (lambda: layered(Causal(), 2, 0), "kv_heads is 0; it must be at least 1"),
        (lambda: layered([Causal(), None], 2, 2), "None among the masks for 2 layers"),  # type: ignore[list-item]
        (lambda: layered([Causal()], 2, 2), "1 masks for 2 layers: give one, or one a layer"),
        (lambda: Strided(4, 1, 4).coverage(0, 1), "kv_heads is 0; it must be at least 1"),
        (lambda: Strided(4, 1, 4).coverage(1, 1.5), "layers is 1.5; it must be an integer of at least 1"),  # type: ignore[arg-type]
    ):
        with pytest.raises(ValueError, match=message):
            made()


@pytest.mark.parametrize("path", sorted((ROOT / "conf" / "mask").glob("*.yaml")), ids=lambda p: p.stem)
def test_presets_serve_small_and_large_models(path: Path) -> None:
    node = confs.composed(f"mask={path.stem}").mask
    mask = confs.made(node)
    assert isinstance(mask, Mask) and hash(mask) == hash(confs.made(node))
    for kv_heads, layers in ((2, 2), (8, 16), (8, 32)):
        assert len(layered(mask, layers, kv_heads)) == layers


def test_masks_take_lists_as_a_config_gives_them() -> None:
    made = pytest.importorskip("hydra.utils").instantiate(
        {
            "_target_": "longspan.kernels.heads.PerHead",
            "_convert_": "all",
            "masks": [
                {"_target_": "longspan.kernels.patterns.Shifted", "chunk": 8, "shifts": [0, 4]},
                {"_target_": "longspan.kernels.neighborhood.Neighborhood", "grid": [4, 4], "window": [3, 1]},
            ],
        }
    )
    assert made == PerHead((Shifted(8, (0, 4)), Neighborhood((4, 4), (3, 1))))
    assert hash(made) == hash(
        PerHead((Shifted(8, (0, 4)), Neighborhood((4, 4), (3, 1), causal=(False, False))))
    )
