"""Where files are read from: the disk, or an encrypted folder, whose files are only ever in memory."""

from __future__ import annotations

import posixpath
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from mptrain.core.errors import DataError
from mptrain.data.sealed.vault import Vault, inside, root_of

Opener = Callable[[Path], Vault]
"""gives the encrypted folder at a path; raises DataError"""


class NoFile(OSError):
    """There is something of that name, and it is no file."""


class Place(ABC):
    """What relative paths start from."""

    secret: bytes | None = None
    """keys the hashes by which a run knows private data"""

    @abstractmethod
    def open(self, name: str) -> BinaryIO:
        """A file that can be read and sought in. Raises OSError, ValueError, RuntimeError."""

    @abstractmethod
    def shown(self, name: str) -> str:
        """The path as messages name it."""

    def read(self, name: str) -> bytes:
        """Raises OSError, also NoFile; ValueError, RuntimeError for what is no path."""
        with self.open(name) as stream:
            return stream.read()


class OnDisk(Place):
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def path(self, name: str) -> Path:
        path = Path(name).expanduser()
        return path if path.is_absolute() else self.folder.absolute() / path

    def open(self, name: str) -> BinaryIO:
        path = self.path(name)
        if path.exists() and not path.is_file():  # a pipe or a device would never end
            raise NoFile(0, "is no file", str(path))
        return path.open("rb")

    def shown(self, name: str) -> str:
        try:
            return str(self.path(name))
        except RuntimeError:  # ~nobody
            return name


class Encrypted(Place):
    """A folder in an encrypted one."""

    def __init__(self, vault: Vault, folder: str) -> None:
        self.vault, self.folder, self.secret = vault, folder, vault.secret

    def open(self, name: str) -> BinaryIO:
        return self.vault.open(inside(self.folder, name))

    def read(self, name: str) -> bytes:
        path = inside(self.folder, name)
        if path not in self.vault.files:
            raise FileNotFoundError(2, "there is no such file in the encrypted folder")
        return b"".join(self.vault.pieces(path))  # without the buffer of a stream, which is larger than most files

    def shown(self, name: str) -> str:
        return f"a file in {self.vault.root}"


def is_there(file: str) -> bool:
    """Whether there is such a file, or an encrypted folder that is it or may hold it."""
    path = Path(file).expanduser()
    return path.is_file() or root_of(path.absolute()) is not None


def locate(file: str, option: str, opener: Opener | None) -> tuple[Place, str] | None:
    """The place of a file named by the recipe's `option` and its name there; None where there is no such file.

    opener: opens encrypted folders, where the recipe gives a key; then nothing else is read. Raises DataError.
    """
    path = Path(file).expanduser()
    root = root_of(path.absolute())
    check_key(file, option, root, opener)
    if root is None:
        return (OnDisk(path.absolute().parent), path.name) if path.is_file() else None
    assert opener is not None
    vault, name = opener(root), path.absolute().relative_to(root).as_posix()
    if name == ".":
        if not vault.single:
            raise DataError(
                f"{option}: {file} is an encrypted folder of {len(vault.files)} files; name one in it, e.g."
                f" {file}/train.csv."
            )
        name = next(iter(vault.files))
    if name not in vault.files:
        raise DataError(f"{option}: the encrypted folder {root} holds no {name}.")
    return Encrypted(vault, posixpath.dirname(name)), posixpath.basename(name)


def check_key(file: str, option: str, root: Path | None, opener: Opener | None) -> None:
    """Raise DataError for encrypted data without a key, and for a key beside data that is in clear."""
    if root is not None and opener is None:
        raise DataError(
            f"{option}: {file} is encrypted. Say where its key is: data.key.file, data.key.env or data.key.command."
        )
    if root is None and opener is not None and Path(file).expanduser().exists():
        raise DataError(
            f"{option}: {file} is not encrypted, and data.key is given. Encrypt it with `mptrain data encrypt`, or drop"
            " data.key."
        )
