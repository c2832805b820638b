"""The pictures that a run drew, inside the page."""

import base64
from collections.abc import Sequence
from html import escape
from pathlib import Path

KINDS = {".png": "image/png", ".gif": "image/gif"}
# A page of more than this is no pleasure on a phone.
MOST = 6 * 2**20
# Up to this width in pixels a picture is of pixels, and not to be blurred.
SMALL = 500


def pictures_html(paths: Sequence[Path], folder: Path) -> str:
    """Figures with the pictures as data; those for which no room is left are named."""
    figures, left, room = list[str](), list[str](), MOST
    for path in paths:
        name = str(path.relative_to(folder))
        data = path.read_bytes()
        if len(data) > room:
            left.append(name)
            continue
        room -= len(data)
        width, height = shape(data)
        size = f' width="{width}" height="{height}"' if width else ""
        kind = ' class="small"' if width <= SMALL else ""
        figures.append(
            f'<figure{kind}><figcaption>{escape(name)}</figcaption><img{size} loading="lazy" '
            f'alt="{escape(path.stem)}, a picture of this run" '
            f'src="data:{KINDS[path.suffix]};base64,{base64.b64encode(data).decode()}"></figure>'
        )
    more = f'<p class="note">Also in the run folder: {escape(", ".join(left))}</p>' if left else ""
    return (f'<div class="pictures">{"".join(figures)}</div>' if figures else "") + more


def shape(data: bytes) -> tuple[int, int]:
    """Width and height in pixels of a PNG or GIF; zeros of anything else."""
    if data[:8] == b"\x89PNG\r\n\x1a\n" and len(data) >= 24:
        return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")
    if data[:4] == b"GIF8" and len(data) >= 10:
        return int.from_bytes(data[6:8], "little"), int.from_bytes(data[8:10], "little")
    return 0, 0
