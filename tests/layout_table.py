"""Which layout serves which mask, found by asking each: `python tests/layout_table.py` prints the table of
docs/layouts.md, between its marks.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from cells import build, meshed
from longspan.kernels.mask import Unsupported
from longspan.parallel.layout import Layout
from matrix import FAMILIES, FIXED, LAYOUTS, LENGTHS, pack

DOCS = Path(__file__).parent.parent / "docs" / "layouts.md"
START, END = "<!-- layouts:start -->", "<!-- layouts:end -->"
RANKS, KV_HEADS = 4, 4
SAID = {
    (True, True): "yes",
    (True, False): "one document",
    (False, False): "no",
}


@contextmanager
def ranks(size: int) -> Iterator[None]:
    """A process group of `size` that sends nothing: placing needs no communication."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=size)
    try:
        yield
    finally:
        meshed.cache_clear()
        dist.destroy_process_group()


def serves(layout: Layout, mask: str, packing: str) -> bool:
    """Whether the layout takes this mask before the first step."""
    try:
        layout.place(LENGTHS[-1], pack(FAMILIES[mask](KV_HEADS), packing, LENGTHS[-1]))
    except Unsupported:
        return False
    return True


def table() -> str:
    """Markdown: a line a mask, a column a layout. 'one document' means that packed sequences are refused."""
    with ranks(RANKS):
        layouts = {name: build(name if name in FIXED else f"{name}/auto", RANKS) for name in LAYOUTS}
        lines = [f"| mask | {' | '.join(layouts)} |", f"|---|{'---|' * len(layouts)}"]
        for mask in FAMILIES:
            said = [SAID[serves(x, mask, "one"), serves(x, mask, "packed")] for x in layouts.values()]
            lines.append(f"| {mask} | {' | '.join(said)} |")
    return "\n".join(lines)


def written() -> str:
    """The table that the docs hold now."""
    return DOCS.read_text().partition(START)[2].partition(END)[0].strip()


if __name__ == "__main__":
    print(START, table(), END, sep="\n")
