"""A stream of documents cut into sequences of one length, as they come: none is padded, and any can be gone
back to by where it begins.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .sample import IGNORE, NOTHING, Ints, Sample


@dataclass(frozen=True)
class Cursor:
    """Where a sequence begins in a stream of records.

    Attributes:
        index: Of the sequence.
        epoch: Times that the stream was read before.
        turn: Files of this epoch that were read before.
        record: Records of the file before the block, which are shuffled together.
        taken: Documents of the block before the one that the sequence begins in.
        offset: Tokens of that one which are in sequences before.
        records: Read in all, those held out too, up to the block.
        bad: Those of them that were no documents.
    """

    index: int = 0
    epoch: int = 0
    turn: int = 0
    record: int = 0
    taken: int = 0
    offset: int = 0
    records: int = 0
    bad: int = 0


class Windows:
    """Sequences of `context` tokens from `start` on, of `documents` that begin with the one `start` is in."""

    def __init__(self, documents: Iterator[tuple[Cursor, Ints]], start: Cursor, context: int) -> None:
        self._documents, self._context = documents, context
        # where the document in hand begins, what it holds, and how much of it is used up
        self._at, self._ids, self._offset = start, np.empty(0, np.int64), 0
        self.index = start.index
        if start.offset:
            self._draw()
            self._offset = start.offset

    @property
    def cursor(self) -> Cursor:
        """Where the next sequence begins."""
        return replace(self._at, index=self.index, offset=self._offset)

    def skip(self) -> None:
        """Leaves one sequence out."""
        for _ in self._pieces():
            pass
        self.index += 1

    def cut(self) -> Sample:
        """The next sequence; only where documents end is it padded. IndexError if there is nothing left."""
        tokens = np.zeros(self._context, np.int64)
        labels = np.full(self._context, IGNORE, np.int64)
        previous = np.full(self._context, NOTHING, np.int64)
        offsets, at = [], 0
        for ids, begin, end in self._pieces():
            offsets.append(at)
            tokens[at : at + end - begin] = ids[begin:end]
            # one token more on either side, where the document has it: a cut loses no label
            after, before = ids[begin + 1 : end + 1], ids[max(begin - 1, 0) : end - 1]
            labels[at : at + len(after)] = after
            at += end - begin
            previous[at - len(before) : at] = before
        if not at:
            raise IndexError(f"sample {self.index}: there are {self.index} of them")
        if at < self._context:
            offsets.append(at)
        self.index += 1
        return Sample(tokens, labels, previous, tuple(offsets))

    def _pieces(self) -> Iterator[tuple[Ints, int, int]]:
        """What fills one sequence: documents, and from where to where they are in it."""
        room = self._context
        while room:
            while self._offset == len(self._ids):
                if not self._draw():
                    return
            begin, end = self._offset, min(len(self._ids), self._offset + room)
            self._offset, room = end, room - (end - begin)
            yield self._ids, begin, end

    def _draw(self) -> bool:
        found = next(self._documents, None)
        if found is not None:
            (self._at, self._ids), self._offset = found, 0
        return found is not None
