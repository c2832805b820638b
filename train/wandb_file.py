"""The file that W&B writes offline: records in LevelDB's log format behind a header of seven bytes."""

import struct
import zlib
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

BLOCK, HEAD, START = 32768, struct.Struct("<IHB"), 7
# A record is whole, or it has a first, middle and last part; what is padded has kind 0.
WHOLE, FIRST, LAST = 1, 2, 4


def records(path: Path) -> Iterator[Any]:
    """The records of a .wandb file, as `wandb.proto` has them, up to one that a kill has torn.

    ValueError for a file of another kind.
    """
    from wandb.proto import wandb_internal_pb2 as proto

    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise ValueError(f"{path} is no file of W&B's: it does not begin with ':W&B'")
    for text in _texts(data):
        record = proto.Record()  # type: ignore[attr-defined]
        record.ParseFromString(text)
        yield record


def _texts(data: bytes) -> Iterator[bytes]:
    at, parts = START, b""
    while at + HEAD.size <= len(data):
        if BLOCK - at % BLOCK < HEAD.size:
            at += BLOCK - at % BLOCK
            continue
        checksum, length, kind = HEAD.unpack_from(data, at)
        part = data[at + HEAD.size : at + HEAD.size + length]
        at += HEAD.size + length
        if kind == 0:
            continue
        if zlib.crc32(part, zlib.crc32(bytes([kind]))) != checksum:
            return
        parts = part if kind in (WHOLE, FIRST) else parts + part
        if kind in (WHOLE, LAST):
            yield parts


def last_step(folder: Path, number: str) -> int:
    """The greatest step that the offline runs of this id in `folder` hold whole, -1 if there is none."""
    found = -1
    for path in folder.glob(f"offline-run-*-{number}*/run-{number}.wandb"):
        # of a start that was killed, or had no room, before it had written anything
        with suppress(ValueError):
            for record in records(path):
                if record.WhichOneof("record_type") == "history":
                    found = max(found, int(record.history.step.num))
    return found
