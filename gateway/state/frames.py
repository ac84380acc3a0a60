"""Steps as bytes, and back. A file is a line that names its version, and then frames: length, checksum, and a packed step.

A file may end in the middle of a frame, if its writer was killed there: no client has received the end of that answer, and the
frame is skipped. A damaged frame is skipped and counted.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterable, Iterator

import msgspec

from gateway.flowcontrol.records import Step

HEADER = b"justitia journal 1\n"

_FRAME = struct.Struct("<II")

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Step).decode


class UnknownVersion(Exception):
    """The file was written by another version of justitia, or by another program."""


def frame(record: Step) -> bytes:
    """One step as bytes. Raises `ValueError`, `TypeError` and `OverflowError` for what cannot be packed."""
    packed = _encode(record)
    return _FRAME.pack(len(packed), zlib.crc32(packed)) + packed


def framed(records: Iterable[Step]) -> bytes:
    """Steps as a whole file."""
    return HEADER + b"".join(map(frame, records))


def read(data: bytes) -> tuple[list[Step], int]:
    """The steps of a file, and how many could not be read. Raises `UnknownVersion`."""
    if not data.startswith(HEADER):
        if HEADER.startswith(data):
            return [], 0  # its writer was killed here
        raise UnknownVersion(f"it begins with {data[: len(HEADER)]!r}")
    records, unreadable = [], 0
    for packed in _frames(data):
        try:
            records.append(_decode(packed))
        except (msgspec.DecodeError, RecursionError):
            unreadable += 1
    return records, unreadable


def _frames(data: bytes) -> Iterator[bytes]:
    """The packed steps of a file; a damaged one as bytes that cannot be unpacked."""
    view, place = memoryview(data), len(HEADER)
    while place + _FRAME.size <= len(view):
        length, checksum = _FRAME.unpack_from(view, place)
        place += _FRAME.size
        packed = view[place : place + length]
        if len(packed) < length:
            return
        place += length
        yield bytes(packed) if zlib.crc32(packed) == checksum else b""
