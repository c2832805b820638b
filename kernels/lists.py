"""Cells -> the columns of each row of tiles, full ones and partial ones, as ranges of one index."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .cells import FULL, PARTIAL, Cells


class Lists(NamedTuple):
    """Columns of one kind by row: what a line of whole cells holds, and more from the mixed cells."""

    whole: Tensor  # bool [lines, cells]
    width: int  # columns in a cell; the last cell may have less
    share: int  # rows that have a line in common
    groups: int
    rows: int  # rows of a group; the lines may have more, which mean nothing
    columns: int
    mixed: Tensor  # int32: columns from mixed cells, those of a row together and ascending
    start: Tensor  # int64 [lines * share]: where those of a row begin in `mixed`
    length: Tensor  # int64 [lines * share]: and how many they are


def ranges(found: Cells, transpose: bool) -> tuple[Tensor, Tensor, Tensor]:
    """The full and the partial columns of each row: int32 [groups * rows, 2], where they begin and end in
    the index, int32. Rows are query tiles, or key tiles to transpose.

    The index begins with all columns in order, for rows that hold all between a first and a last one.
    """
    view = _by_key if transpose else _by_query
    kinds = [view(found, kind) for kind in (FULL, PARTIAL)]
    index = [torch.arange(kinds[0].columns, dtype=torch.int32, device=found.whole.device)]
    full, partial = (_ranges(lists, index) for lists in kinds)
    if sum(map(len, index)) >= 2**31:
        raise ValueError(f"{sum(map(len, index))} tiles are more than int32 counts; take larger tiles")
    return full, partial, torch.cat(index)


def _by_query(found: Cells, kind: int) -> Lists:
    batch, heads, blocks, keys = found.whole.shape
    row, head, block, key = found.mixed
    lines = (found.whole == kind).view(-1, keys)
    line = (row * heads + head) * blocks + block
    order = (line * keys + key).argsort()
    hit = found.each[:, order] == kind
    # of each tile of a block by itself, as many as lie before each mixed cell
    before = pad(hit.cumsum(1, dtype=torch.int32), (1, 0))
    edges = torch.searchsorted(line[order], torch.arange(len(lines) + 1, device=line.device))
    at = before[:, edges] + (before[:, -1:].cumsum(0) - before[:, -1:])
    return Lists(
        whole=lines, width=1, share=len(hit), groups=batch * heads, rows=found.rows, columns=keys,
        mixed=key[order].int().expand_as(hit)[hit], start=at[:, :-1].T.flatten(),
        length=at.diff().T.flatten(),
    )  # fmt: skip


def _by_key(found: Cells, kind: int) -> Lists:
    batch, heads, blocks, keys = found.whole.shape
    row, head, block, key = found.mixed
    lines = (found.whole == kind).transpose(2, 3).reshape(-1, blocks)
    line = (row * heads + head) * keys + key
    order = (line * blocks + block).argsort()
    hit = (found.each[:, order] == kind).T
    before = pad(hit.sum(1).cumsum(0), (1, 0))
    at = before[torch.searchsorted(line[order], torch.arange(len(lines) + 1, device=line.device))]
    height = hit.shape[1]
    column = _spread(block[order].int(), height).view(-1, height)
    return Lists(
        whole=lines, width=height, share=1, groups=batch * heads, rows=keys, columns=found.rows,
        mixed=column[hit], start=at[:-1], length=at.diff(),
    )  # fmt: skip


def _ranges(lists: Lists, index: list[Tensor]) -> Tensor:
    """Where each row's columns begin and end in the index, to which those that it lacks are added."""
    whole, first, last = _ends(lists)
    count = whole + lists.length
    loose = (count > 0) & (last - first + 1 != count)
    begin = torch.where(count > 0, first, 0)
    begin[loose] = sum(map(len, index)) + _before(count[loose])
    if loose.any():
        index.append(_written(lists, whole, loose))
    found = torch.stack((begin, begin + count), 1).view(lists.groups, -1, 2)
    return found[:, : lists.rows].flatten(0, 1).int()


def _ends(lists: Lists) -> tuple[Tensor, Tensor, Tensor]:
    """Of each row, columns in whole cells, and the first and last column of all; of no column, anything."""
    cells, width = lists.whole.shape[1], lists.width
    mark = lists.whole.to(torch.uint8)
    count = mark.sum(1) * width - mark[:, -1] * (cells * width - lists.columns)
    first, last = mark.argmax(1) * width, (cells - mark.flip(1).argmax(1)) * width - 1
    count, first, last = (
        x.repeat_interleave(lists.share) for x in (count, first, last.clamp(max=lists.columns - 1))
    )
    mixed, none, some = pad(lists.mixed, (0, 1)), count == 0, lists.length > 0
    first_mixed, last_mixed = mixed[lists.start], mixed[lists.start + (lists.length - 1).clamp(min=0)]
    first = torch.where(some & (none | (first_mixed < first)), first_mixed, first)
    return count, first, torch.where(some & (none | (last_mixed > last)), last_mixed, last)


def _written(lists: Lists, whole: Tensor, loose: Tensor) -> Tensor:
    """The columns of the loose rows one after the other: those of whole cells, then of mixed ones."""
    used = loose.view(-1, lists.share).any(1)
    cell = (lists.whole & used[:, None]).nonzero()[:, 1].int()
    column = _spread(cell, lists.width)
    if lists.columns % lists.width:
        column = column[column < lists.columns]
    row = loose.nonzero()[:, 0]
    line = row // lists.share
    held = torch.where(used, whole.view(-1, lists.share)[:, 0], 0)
    start = torch.stack((_before(held)[line], len(column) + lists.start[row]), 1).flatten()
    count = torch.stack((whole[row], lists.length[row]), 1).flatten()
    return _pieces(torch.cat((column, lists.mixed)), start[count > 0], count[count > 0])


def _pieces(x: Tensor, start: Tensor, count: Tensor) -> Tensor:
    """x[start : start + count] of each piece, one after the other; no count is 0."""
    at = torch.ones(int(count.sum()), dtype=torch.int32, device=x.device)
    # a step from one element to the next, a jump from the end of a piece to the start of the next one
    at[_before(count)] = (start - pad((start + count - 1)[:-1], (1, 0))).int()
    return x.index_select(0, at.cumsum_(0))


def _spread(cell: Tensor, width: int) -> Tensor:
    """The columns of each cell: int32 [cells * width]."""
    inside = torch.arange(width, dtype=torch.int32, device=cell.device)
    return (cell[:, None] * width + inside).flatten()


def _before(count: Tensor) -> Tensor:
    """How many come before each."""
    return count.cumsum(0) - count
