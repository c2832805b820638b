"""A list of records, checked once and kept: which are good, which are bad, and which are held out."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np

from .corpus import Bad
from .order import Split
from .sample import Ints

# So many bad records never stop a run: a share means little in a small set.
_ALWAYS_ALLOWED = 10
_LISTED = 20
# Of the files that `kept` writes; another number makes the old ones unused.
_VERSION = 1


@dataclass(frozen=True)
class Index:
    """Good records as plain dicts, each with the `digest` of its content; and the bad ones."""

    rows: list[dict[str, Any]]
    bad: list[Bad]

    @classmethod
    def of(cls, found: Iterable[dict[str, Any] | Bad]) -> "Index":
        rows: list[dict[str, Any]] = []
        bad: list[Bad] = []
        for record in found:
            if isinstance(record, Bad):
                bad.append(record)
            else:
                rows.append(record)
        return cls(rows, bad)

    def check(self, budget: float, where: str) -> None:
        """ValueError if none is good, or more than this share (and more than 10, unless it is 0) is bad."""
        records = len(self.rows) + len(self.bad)
        allowed = max(budget * records, _ALWAYS_ALLOWED if budget else 0)
        if self.rows and len(self.bad) <= allowed:
            return
        lines = [f"  {bad.location}: {bad.reason}" for bad in self.bad[:_LISTED]]
        if len(self.bad) > _LISTED:
            lines.append(f"  and {len(self.bad) - _LISTED} more")
        say = f"data.bad_budget={budget}: {len(self.bad)} of {records} records of {where} are bad"
        raise ValueError("\n".join([f"{say}; mend them or raise the budget:", *lines]))

    def split(self, held_out: float) -> Split:
        """A share of the records, held out by the hash of their content: copies stay on one side.

        Raises:
            ValueError: A part would be empty.
        """
        keys = np.array([int(row["digest"][:15], 16) / 16.0**15 for row in self.rows])
        count = min(max(1, round(held_out * len(keys))), len(keys) - 1)
        held = keys <= np.sort(keys)[count - 1] if count > 0 else np.zeros(len(keys), bool)
        if held.all() or not held.any():
            raise ValueError(
                f"data: {len(keys)} good record(s), {len(set(keys))} of them different, cannot be split into "
                f"training and held-out: give at least 2"
            )
        return Split(_where(~held), _where(held))

    def sha256(self) -> str:
        """A hash of what the records hold, in order."""
        return hashlib.sha256("".join(row["digest"] for row in self.rows).encode()).hexdigest()

    def describe(self) -> dict[str, Any]:
        return {
            "sha256": self.sha256(),
            "records": len(self.rows) + len(self.bad),
            "bad": len(self.bad),
            "bad_records": [asdict(bad) for bad in self.bad[:_LISTED]],
        }


def kept(cache: str | os.PathLike[str], key: object, build: Callable[[], Index]) -> Index:
    """The index that `build` makes, from the cache if it was made of the same `key` (plain data) before.

    Raises:
        OSError: The cache cannot be written.
    """
    said = json.dumps([_VERSION, key], sort_keys=True)
    home = Path(cache) / f"index-{hashlib.sha256(said.encode()).hexdigest()[:32]}.json"
    try:
        written = json.loads(home.read_bytes())
        if written["sha256"] == _checksum(written["rows"], written["bad"]):
            return Index(written["rows"], [Bad(**bad) for bad in written["bad"]])
    except (OSError, ValueError, KeyError, TypeError):
        pass
    index = build()
    bad = [asdict(record) for record in index.bad]
    text = json.dumps({"rows": index.rows, "bad": bad, "sha256": _checksum(index.rows, bad)})
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        work = home.with_name(f"{home.name}.tmp-{uuid4().hex}")
        work.write_text(text)
        work.replace(home)
    except OSError as error:
        hint = "set data.cache to a folder that can be written and has room"
        raise OSError(f"data.cache={os.fspath(cache)!r} cannot be used: {error}; {hint}") from error
    return index


def _checksum(rows: list[dict[str, Any]], bad: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps([rows, bad], sort_keys=True).encode()).hexdigest()


def _where(chosen: np.ndarray[Any, np.dtype[np.bool_]]) -> Ints:
    return np.flatnonzero(chosen).astype(np.int64)
