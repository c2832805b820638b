"""Documents cut into pieces, and pieces packed into sequences of one length by greedy best fit."""

import bisect
from dataclasses import dataclass

import numpy as np

from .sample import Ints


@dataclass(frozen=True)
class Pieces:
    """Runs of tokens, each of one document; int64 `[pieces]`, in the order of the corpus.

    Attributes:
        begin, end: Where the piece lies in the corpus.
        first, last: Where its document lies: `[first, last)`.
    """

    begin: Ints
    end: Ints
    first: Ints
    last: Ints


def cut(first: Ints, last: Ints, context: int) -> Pieces:
    """Cut documents `[first[i], last[i])` into pieces of `context` tokens and a shorter rest."""
    counts = -(-(last - first) // context)
    document = np.repeat(np.arange(len(first)), counts)
    within = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    begin = first[document] + within * context
    return Pieces(begin, np.minimum(begin + context, last[document]), first[document], last[document])


def best_fit(lengths: Ints, context: int) -> Ints:
    """Give each piece a bin of `context` tokens, int64 `[pieces]`: best-fit decreasing.

    Longest first, each piece goes where it leaves the least room. Bins of equal room and pieces of equal
    length are handled together, so there are a few steps per distinct length, not one per piece and bin.
    Source: Krell et al. 2021, "Efficient sequence packing without cross-contamination" (arXiv:2107.02027).
    """
    order = np.argsort(-lengths, kind="stable")
    sizes, counts = np.unique(lengths, return_counts=True)
    chosen = np.empty(len(lengths), dtype=np.int64)
    bins = 0
    at = 0
    # Bins by the room they have left, and the sorted rooms of which there is a bin.
    by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    for size, left in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            place = bisect.bisect_left(rooms, size)
            fresh = place == len(rooms)
            room = context if fresh else rooms[place]
            # After the first piece a bin has the least room of all that still fit this size: fill it up.
            fill = min(room // size, left)
            number = left // fill
            if fresh:
                taken = list(range(bins, bins + number))
                bins += number
            else:
                taken = _take(by_room, rooms, place, number)
            placed = fill * len(taken)
            chosen[order[at : at + placed]] = np.repeat(taken, fill)
            _put(by_room, rooms, room - fill * size, taken)
            at += placed
            left -= placed
    return chosen


def _take(by_room: dict[int, list[int]], rooms: list[int], place: int, number: int) -> list[int]:
    stack = by_room[rooms[place]]
    taken = stack[-number:]
    del stack[-number:]
    if not stack:
        del by_room[rooms.pop(place)]
    return taken


def _put(by_room: dict[int, list[int]], rooms: list[int], room: int, bins: list[int]) -> None:
    if room == 0:
        return
    if room not in by_room:
        by_room[room] = []
        bisect.insort(rooms, room)
    by_room[room] += bins


def group(bins: Ints) -> tuple[Ints, Ints]:
    """The pieces of every bin: bin i holds `members[bounds[i] : bounds[i + 1]]`.

    Bins come in the order of their first piece, pieces of a bin in the order of the corpus.
    """
    _, opened, inverse = np.unique(bins, return_index=True, return_inverse=True)
    rank = np.empty(len(opened), dtype=np.int64)
    rank[np.argsort(opened)] = np.arange(len(opened))
    number = rank[inverse]
    bounds = np.concatenate([[0], np.cumsum(np.bincount(number))])
    return np.argsort(number, kind="stable"), bounds
