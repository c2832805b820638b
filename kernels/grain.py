"""How finely a mask chooses among keys far away: what the tiles of keys should divide."""

from .heads import PerHead
from .mask import And, Bound, Mask, Or
from .ordered import BrickByBrick
from .patterns import BlockPermutation, Strided


def grain(mask: Mask) -> int:
    """Tokens in the blocks of keys that the mask shows or hides as a whole; 0 if it knows no blocks.

    Documents have none, for within them the blocks begin anew at any position.
    """
    match mask:
        case Strided(block, stride=stride) if stride > 1:
            return block
        case BlockPermutation(block):
            return block
        case And(left, right) | Or(left, right):
            return _finer(grain(left), grain(right))
        case PerHead(masks):
            return _finer(*map(grain, masks))
        case Bound(inner) | BrickByBrick(inner):
            return grain(inner)
    return 0


def _finer(*grains: int) -> int:
    return min((x for x in grains if x), default=0)
