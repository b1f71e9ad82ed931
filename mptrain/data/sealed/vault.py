"""A folder of encrypted files, read in memory.

    sealed.json          schema, cipher, salt, a value that tells a wrong key; in clear, and authenticated by the index
    index.sealed         one piece: kind, secret, files {path, bytes, first, pieces}, bytes of each shard
    shard-00000.sealed…  8 bytes MARK, 8 bytes its number, then pieces of at most PIECE bytes of one file each

The index says which shards there are and how long each is, and a piece opens only where it was written: a shard that
is missing, cut, changed or in another's place is named. `secret` is random, survives a rotation of the key and keys
the hashes by which runs know the data. Memory is bounded by a piece.
"""

from __future__ import annotations

import io
import json
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO

from mptrain.core.errors import DataError
from mptrain.data.sealed.cipher import CIPHERS, TAG, Cipher, Damaged, check_value

SCHEMA = "mptrain.sealed/v1"
HEADER, INDEX = "sealed.json", "index.sealed"
MARK = b"mpsealed"
PIECE = 2**20
FIRST = 16  # bytes of a shard before its pieces


@dataclass(frozen=True)
class Entry:
    """One file. first: number of its first piece. pieces: (shard, offset in it, bytes of plaintext) in order."""

    path: str
    bytes: int
    first: int
    pieces: list[tuple[int, int, int]]


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.sealed"


def about_piece(salt: bytes, number: int, shard: int) -> bytes:
    return MARK + salt + number.to_bytes(8, "big") + shard.to_bytes(8, "big")


def root_of(path: Path) -> Path | None:
    """The folder of encrypted files that is, or holds, `path`; None where there is none."""
    return next((p for p in (path, *path.parents) if (p / HEADER).is_file()), None)


class Vault:
    """The files of an encrypted folder. `single`: it was made of one file."""

    def __init__(self, root: Path, key: bytes, field: str = "data.key") -> None:
        """Raises DataError for a wrong key, and for an index or a shard that is not as it was written."""
        self.root = root
        header = _header(root)
        try:
            self.cipher, self.salt = str(header["cipher"]), bytes.fromhex(header["salt"])
            if self.cipher not in CIPHERS:
                raise ValueError(f"cipher {self.cipher}")
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{root / HEADER}: damaged ({error}); take the folder from its backup.") from None
        if header.get("check") != check_value(key, self.salt):
            raise DataError(
                f"{field}: it is not the key that {root} was encrypted with. Give that one; where the key was rotated,"
                " the new one."
            )
        self._key = key
        index = self._index()
        self.secret = bytes.fromhex(index["secret"])
        self.single = index["kind"] == "file"
        self.shards: list[int] = index["shards"]
        entries = [Entry(f["path"], f["bytes"], f["first"], [tuple(p) for p in f["pieces"]]) for f in index["files"]]
        self.files = {entry.path: entry for entry in entries}
        self._check_shards()

    @cached_property
    def _pieces(self) -> Cipher:
        return Cipher(self.cipher, self._key, self.salt, "pieces")

    def _index(self) -> dict[str, Any]:
        file = self.root / INDEX
        try:
            sealed, header = file.read_bytes(), (self.root / HEADER).read_bytes()
            return json.loads(Cipher(self.cipher, self._key, self.salt, "index").open(0, sealed, header))
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({error.strerror}); take it from its backup.") from None
        except Damaged:
            raise DataError(f"{file}: not as it was written; take {HEADER} and {INDEX} from their backup.") from None

    def _check_shards(self) -> None:
        for number, size in enumerate(self.shards):
            file = self.root / shard_name(number)
            try:
                there = file.stat().st_size
            except OSError as error:
                raise self._damage(number, f"is missing ({error.strerror})") from None
            if there != size:
                raise self._damage(number, f"is {'cut off' if there < size else 'too long'}: {there} bytes of {size}")
            with file.open("rb") as stream:
                self._check_first(number, stream.read(FIRST))

    def _check_first(self, number: int, first: bytes) -> None:
        if first[:8] != MARK:
            raise self._damage(number, "was changed: it does not begin as a shard does")
        if (other := int.from_bytes(first[8:], "big")) != number:
            raise self._damage(number, f"is shard {other} in the place of shard {number}: the order was changed")

    def _damage(self, number: int, what: str) -> DataError:
        name = self.root / shard_name(number)
        return DataError(f"{name} {what}. Nothing of the data is used; take the folder from its backup.")

    def piece(self, entry: Entry, index: int) -> bytes:
        """Plaintext of a piece of a file. Raises DataError naming the shard."""
        shard, offset, length = entry.pieces[index]
        number = entry.first + index
        try:
            with (self.root / shard_name(shard)).open("rb", buffering=0) as stream:
                stream.seek(offset)
                sealed = stream.read(length + TAG)
            return self._pieces.open(number, sealed, about_piece(self.salt, number, shard))
        except OSError as error:
            raise self._damage(shard, f"cannot be read ({error.strerror})") from None
        except Damaged:
            raise self._damage(shard, "was changed: it is not as it was written") from None

    def pieces(self, path: str) -> Iterator[bytes]:
        entry = self.files[path]
        return (self.piece(entry, index) for index in range(len(entry.pieces)))

    def open(self, path: str) -> BinaryIO:
        """Raises FileNotFoundError for a file that it does not hold."""
        if path not in self.files:
            raise FileNotFoundError(2, "there is no such file in the encrypted folder")
        return io.BufferedReader(_Stream(self, self.files[path]), PIECE)


class _Stream(io.RawIOBase):
    """A file, decrypted piece by piece; one is kept."""

    def __init__(self, vault: Vault, entry: Entry) -> None:
        self._vault, self._entry = vault, entry
        self._at, self._number, self._kept = 0, -1, b""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        start = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._entry.bytes}[whence]
        self._at = max(0, start + offset)
        return self._at

    def readinto(self, buffer: Any) -> int:
        if self._at >= self._entry.bytes:
            return 0
        number, inside = divmod(self._at, PIECE)
        if number != self._number:
            self._kept, self._number = self._vault.piece(self._entry, number), number
        part = self._kept[inside : inside + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def _header(root: Path) -> dict[str, Any]:
    file = root / HEADER
    try:
        header = json.loads(file.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{file}: cannot be read ({error}); take the folder from its backup.") from None
    schema = header.get("schema") if isinstance(header, dict) else None
    if schema != SCHEMA:
        raise DataError(f"{file}: its schema is {schema!r}, this version of mptrain reads {SCHEMA!r}.")
    return header


def inside(folder: str, name: str) -> str:
    """A path in an encrypted folder, from a name relative to `folder`. Raises FileNotFoundError outside of it."""
    path = posixpath.normpath(posixpath.join(folder, name))
    if path.startswith(("/", "..")):
        raise FileNotFoundError(2, "the path leads out of the encrypted folder")
    return path
