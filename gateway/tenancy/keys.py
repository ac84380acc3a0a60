"""API keys: who may come in, and as which tenant.

A key is `jk_<id>_<secret>` with 256 random bits of secret. The file holds no secrets, but a hash of each: BLAKE2b under the
file's own random key, with a salt for each entry. A slow hash like Argon2 is for what people think up, to make guessing
dear; nobody guesses 256 random bits at any speed, and every request would pay for it.

The file is JSON, for its owner alone. It is changed under a lock and takes the old one's place at once and whole, so that
whoever reads it meanwhile sees one or the other, and of two who change it neither is lost.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, NamedTuple

import msgspec

from gateway.config.settings import TENANT_NAME
from predictor.files import write_atomically

VERSION = 1
SECRET_BYTES, HASH_BYTES, SALT_BYTES = 32, 32, blake2b.SALT_SIZE
MAX_NOTE_CHARS = 200

_ID = re.compile(r"[0-9a-f]{8}")
_KEY = re.compile(rf"jk_({_ID.pattern})_([0-9a-f]{{{2 * SECRET_BYTES}}})")
_TENANT = re.compile(TENANT_NAME)
_Moment = Annotated[datetime, msgspec.Meta(tz=True)]


class KeysError(ValueError):
    """The file of keys cannot be read or written, or does not hold what is asked for."""


class Key(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What is kept of a key. revoked: when it was, if it was."""

    id: str
    tenant: str
    created: _Moment
    salt: bytes
    hash: bytes
    note: str = ""
    revoked: _Moment | None = None


class _File(msgspec.Struct, forbid_unknown_fields=True):
    version: int
    hash_key: bytes
    keys: list[Key]


class Stamp(NamedTuple):
    """Of a file as it was read: another one has another stamp."""

    inode: int
    modified_ns: int
    size: int


class Keys:
    """Those of a file, as it was when it was read. path: None if they are of none. stamp: None if it was not there."""

    def __init__(self, file: _File | None = None, path: Path | None = None, stamp: Stamp | None = None) -> None:
        self.path = path
        self.stamp = stamp
        self._hash_key = file.hash_key if file else secrets.token_bytes(HASH_BYTES)
        self._keys = {key.id: key for key in file.keys} if file else {}
        # An id that is not known takes as long as one that is.
        self._nobody = Key("", "", datetime.min, bytes(SALT_BYTES), secrets.token_bytes(HASH_BYTES))  # noqa: DTZ901

    @classmethod
    def load(cls, path: Path) -> Keys:
        """A file that is not there holds no keys. Raises `KeysError`."""
        file, stamp = _read(path)
        return cls(file, path, stamp)

    @property
    def configured(self) -> bool:
        """Whether a key is needed: one that was revoked counts, or revoking the last one would let everybody in."""
        return bool(self._keys)

    @cached_property
    def tenants(self) -> set[str]:
        return {key.tenant for key in self._keys.values()}

    def __iter__(self) -> Iterator[Key]:
        return iter(self._keys.values())

    def tenant_of(self, secret: str) -> str | None:
        """Whose key it is; None if it is nobody's, or was revoked."""
        parts = _KEY.fullmatch(secret)
        if parts is None:
            return None
        key = self._keys.get(parts[1], self._nobody)
        is_right = hmac.compare_digest(_hash(parts[2], self._hash_key, key.salt), key.hash)
        return key.tenant if is_right and key.revoked is None else None


def stamp_of(path: Path) -> Stamp | None:
    """None for a file that is not there, or cannot be seen."""
    try:
        return _stamp(path.stat())
    except OSError:
        return None


def add_key(path: Path, tenant: str, note: str, now: datetime) -> tuple[Key, str]:
    """A new key for a tenant: what is kept, and the key itself, which nobody can have a second time. Raises `KeysError`."""
    if not _TENANT.fullmatch(tenant):
        raise KeysError(
            f"{tenant[:80]!r} is no tenant's name: 1 to 64 letters, digits and . _ -, the first a letter or digit"
        )
    if len(note) > MAX_NOTE_CHARS or not note.isprintable():
        raise KeysError(f"a note is one line of at most {MAX_NOTE_CHARS} characters")
    with _changing(path) as file:
        known = {key.id for key in file.keys}
        while (key_id := secrets.token_hex(4)) in known:
            pass
        secret, salt = secrets.token_hex(SECRET_BYTES), secrets.token_bytes(SALT_BYTES)
        key = Key(key_id, tenant, now, salt, _hash(secret, file.hash_key, salt), note)
        file.keys.append(key)
    return key, f"jk_{key_id}_{secret}"


def revoke_key(path: Path, key_id: str, now: datetime) -> Key:
    """As it then is; one that was revoked stays as it was. Raises `KeysError`."""
    with _changing(path) as file:
        for place, key in enumerate(file.keys):
            if key.id == key_id:
                if key.revoked is None:
                    file.keys[place] = msgspec.structs.replace(key, revoked=now)
                return file.keys[place]
        raise KeysError(f"{path}: there is no key {key_id!r}")


def _hash(secret: str, hash_key: bytes, salt: bytes) -> bytes:
    return blake2b(
        secret.encode(), digest_size=HASH_BYTES, key=hash_key, salt=salt, person=b"justitia api key"
    ).digest()


def _stamp(status: os.stat_result) -> Stamp:
    return Stamp(status.st_ino, status.st_mtime_ns, status.st_size)


def _read(path: Path) -> tuple[_File | None, Stamp | None]:
    try:
        with path.open("rb") as opened:
            stamp = _stamp(os.fstat(opened.fileno()))
            data = opened.read()
    except FileNotFoundError:
        return None, None
    except OSError as error:
        raise KeysError(f"{path}: the file of keys cannot be read: {error.strerror}") from error
    try:
        file = msgspec.json.decode(data, type=_File)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise KeysError(f"{path}: this is no file of keys: {error}") from error
    if (wrong := _wrong(file)) is not None:
        raise KeysError(f"{path}: this is no file of keys: {wrong}")
    return file, stamp


def _wrong(file: _File) -> str | None:
    if file.version != VERSION:
        return f"its version is {file.version}, not {VERSION}"
    if len(file.hash_key) != HASH_BYTES:
        return f"`hash_key` has {len(file.hash_key)} bytes, not {HASH_BYTES}"
    if len({key.id for key in file.keys}) < len(file.keys):
        return "two keys have the same id"
    for place, key in enumerate(file.keys):
        if not _ID.fullmatch(key.id) or not _TENANT.fullmatch(key.tenant):
            return f"`keys[{place}]` has an id or a tenant that there cannot be"
        if len(key.salt) != SALT_BYTES or len(key.hash) != HASH_BYTES:
            return f"`keys[{place}]` has a salt or a hash of the wrong length"
    return None


@contextmanager
def _changing(path: Path) -> Iterator[_File]:
    """The file, to be changed in here; it is written if nothing is raised. Raises `KeysError`."""
    path = Path(os.path.realpath(path))  # a link stays one
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = os.open(path.with_name(path.name + ".lock"), os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            file = _read(path)[0] or _File(VERSION, secrets.token_bytes(HASH_BYTES), [])
            before = list(file.keys)
            yield file
            if file.keys != before:
                _write(path, file)
        finally:
            os.close(lock)
    except OSError as error:
        raise KeysError(f"{path}: the file of keys cannot be changed: {error.strerror}") from error


def _write(path: Path, file: _File) -> None:
    """Durable, since an empty file after a power cut counts as no file, and then every client is let in. Raises `OSError`."""
    write_atomically(path, [msgspec.json.format(msgspec.json.encode(file), indent=1), b"\n"], durable=True)
