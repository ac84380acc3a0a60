"""Steps as bytes, and back. A file is a line that names its version, and then frames: length, checksum, and a packed step.

A file may end anywhere, as its writer may have been killed in the middle of a frame: nobody was told that this one was
written, and it is passed over. A frame that is damaged is passed over and counted.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

import msgspec

from gateway.state.types import Record

HEADER = b"justitia journal 1\n"

_FRAME = struct.Struct("<II")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Record).decode


class UnknownVersion(Exception):
    """Another version of justitia has written this, or somebody else."""


def frame(record: Record) -> bytes:
    """Raises `ValueError`, `TypeError` and `OverflowError` for what cannot be packed."""
    packed = _encode(record)
    return _FRAME.pack(len(packed), zlib.crc32(packed)) + packed


def framed(records: Iterable[Record]) -> bytes:
    """A whole file."""
    return HEADER + b"".join(map(frame, records))


def read(data: bytes) -> tuple[list[Record], int]:
    """The steps of a file, and how many could not be read. Raises `UnknownVersion`."""
    if not data.startswith(HEADER):
        if HEADER.startswith(data):
            return [], 0  # its writer came no further
        raise UnknownVersion(f"it begins with {data[: len(HEADER)]!r}")
    records, unreadable = [], 0
    for packed in _frames(data):
        try:
            records.append(_decode(packed))
        except (msgspec.DecodeError, RecursionError):
            unreadable += 1
    return records, unreadable


def _frames(data: bytes) -> Iterator[bytes]:
    """What is damaged comes as something that cannot be unpacked."""
    view, place = memoryview(data), len(HEADER)
    while place + _FRAME.size <= len(view):
        length, checksum = _FRAME.unpack_from(view, place)
        place += _FRAME.size
        packed = view[place : place + length]
        if len(packed) < length:
            return
        place += length
        yield bytes(packed) if zlib.crc32(packed) == checksum else b""
