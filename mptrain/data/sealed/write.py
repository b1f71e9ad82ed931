"""Writing encrypted folders, from files or from another encrypted folder, and files from them.

What is written is whole or not there; a file is read in pieces, so memory does not grow with it.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mptrain.core.disk import whole
from mptrain.core.errors import DataError, UserError
from mptrain.data.sealed.cipher import Cipher, check_value
from mptrain.data.sealed.vault import (
    FIRST,
    HEADER,
    INDEX,
    MARK,
    PIECE,
    SCHEMA,
    Vault,
    about_piece,
    inside,
    root_of,
    shard_name,
)

SHARD = 64 * 2**20
"""bytes from which on a shard gets no further piece"""

Item = tuple[str, Iterable[bytes]]
"""a file: its path, and its content in pieces of PIECE bytes, the last one shorter"""


def encrypt(source: Path, target: Path, key: bytes, cipher: str) -> dict[str, Any]:
    """Encrypt a file or a folder with everything below it into the folder `target`, which must not exist.

    Returns {files, bytes, shards}. Raises DataError for a source without files, UserError for a target that is there.
    """
    check_new(target, source)
    if root_of(source.absolute()) is not None:
        raise DataError(f"{source}: it is encrypted already; `mptrain data rotate` gives it another key.")
    if source.is_file():
        return write([(source.name, _read(source))], "file", target, key, cipher)
    if not source.is_dir():
        raise DataError(f"{source}: there is no such file or folder.")
    files = sorted(path for path in source.rglob("*") if path.is_file())
    if not files:
        raise DataError(f"{source}: there is no file in it.")
    items = ((path.relative_to(source).as_posix(), _read(path)) for path in files)
    return write(items, "folder", target, key, cipher)


def rotate(source: Vault, target: Path, key: bytes, cipher: str) -> dict[str, Any]:
    """The same files under another key. What runs know the data by stays."""
    check_new(target, source.root)
    kind = "file" if source.single else "folder"
    return write(((path, source.pieces(path)) for path in source.files), kind, target, key, cipher, source.secret)


def decrypt(source: Vault, target: Path) -> dict[str, Any]:
    """The files as they were, readable by their owner alone."""
    check_new(target, source.root)
    size = sum(entry.bytes for entry in source.files.values())
    facts = {"files": len(source.files), "bytes": size, "shards": len(source.shards)}
    if source.single:
        scratch = target.with_name(f".{target.name}.tmp")
        try:
            _put(source, next(iter(source.files)), scratch)
            os.replace(scratch, target)
        finally:
            scratch.unlink(missing_ok=True)
        return facts
    with whole(target) as folder:
        for path in source.files:
            _put(source, path, folder / inside("", path))
    target.chmod(0o700)
    return facts


def _put(source: Vault, path: str, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(os.open(file, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as stream:
        for piece in source.pieces(path):
            stream.write(piece)


def write(
    items: Iterable[Item], kind: str, target: Path, key: bytes, cipher: str, secret: bytes | None = None
) -> dict[str, Any]:
    """Write an encrypted folder. kind: "file" or "folder"."""
    salt = secrets.token_bytes(32)
    header = {"schema": SCHEMA, "cipher": cipher, "salt": salt.hex(), "check": check_value(key, salt)}
    content = (json.dumps(header, indent=1) + "\n").encode()
    with whole(target) as scratch:
        shards = _Shards(scratch, Cipher(cipher, key, salt, "pieces"), salt)
        files = [shards.add(path, pieces) for path, pieces in items]
        sizes = shards.close()
        index = {"kind": kind, "secret": (secret or secrets.token_bytes(32)).hex(), "files": files, "shards": sizes}
        (scratch / HEADER).write_bytes(content)
        sealed = Cipher(cipher, key, salt, "index").seal(0, json.dumps(index).encode(), content)
        (scratch / INDEX).write_bytes(sealed)
    return {"files": len(files), "bytes": sum(file["bytes"] for file in files), "shards": len(sizes)}


def check_new(target: Path, source: Path) -> None:
    if target.exists():
        raise UserError(f"{target}: it exists already; give a new name, or move it away first.")
    if source.resolve() in target.resolve().parents:
        raise UserError(f"{target}: it lies in {source}, which is read; give a place outside of it.")


def pieces_of_bytes(parts: Iterable[bytes]) -> Iterator[bytes]:
    """Parts of any length, one after the other, in pieces of PIECE bytes."""
    kept = bytearray()
    for part in parts:
        kept += part
        while len(kept) >= PIECE:
            yield bytes(kept[:PIECE])
            del kept[:PIECE]
    if kept:
        yield bytes(kept)


def _read(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(PIECE):
            yield piece


class _Shards:
    """Appends pieces to shards, the next one begun when one is full."""

    def __init__(self, folder: Path, cipher: Cipher, salt: bytes) -> None:
        self._folder, self._cipher, self._salt = folder, cipher, salt
        self._sizes: list[int] = []
        self._stream: BinaryIO | None = None
        self._next = 0

    def add(self, path: str, content: Iterable[bytes]) -> dict[str, Any]:
        first, places, size = self._next, [], 0
        for piece in content:
            stream = self._shard()
            shard = len(self._sizes) - 1
            sealed = self._cipher.seal(self._next, piece, about_piece(self._salt, self._next, shard))
            places.append([shard, self._sizes[shard], len(piece)])
            stream.write(sealed)
            self._sizes[shard] += len(sealed)
            self._next += 1
            size += len(piece)
        return {"path": path, "bytes": size, "first": first, "pieces": places}

    def _shard(self) -> BinaryIO:
        if self._stream is None or self._sizes[-1] >= SHARD:
            self.close()
            self._stream = (self._folder / shard_name(len(self._sizes))).open("wb")
            self._stream.write(MARK + len(self._sizes).to_bytes(8, "big"))
            self._sizes.append(FIRST)
        return self._stream

    def close(self) -> list[int]:
        """Returns the bytes of each shard."""
        if self._stream is not None:
            self._stream.close()
        return self._sizes
