"""What a run keeps of private examples, encrypted under the secret of their data, which no run folder holds."""

from __future__ import annotations

import secrets
from pathlib import Path

from mptrain.core.errors import MptrainError
from mptrain.data.sealed.cipher import Cipher, Damaged

_SALT = 32


def seal(secret: bytes, content: bytes, purpose: str) -> bytes:
    """Under a key of its own: of a salt that is drawn every time."""
    salt = secrets.token_bytes(_SALT)
    return salt + Cipher("aes-256-gcm", secret, salt, purpose).seal(0, content, b"")


def unseal(secret: bytes, sealed: bytes, purpose: str) -> bytes:
    """Raises MptrainError for what other data wrote, or what was damaged."""
    try:
        return Cipher("aes-256-gcm", secret, sealed[:_SALT], purpose).open(0, sealed[_SALT:], b"")
    except Damaged:
        raise MptrainError(
            f"the {purpose} in the run folder are damaged, or were written with other data. Start again with --fresh."
        ) from None


def write(path: Path, content: bytes, secret: bytes | None, purpose: str) -> None:
    """Whole or not at all. secret: None, of data that are not private; the file is then in clear."""
    new = path.with_name(f".{path.name}")
    new.write_bytes(content if secret is None else seal(secret, content, purpose))
    new.replace(path)


def read(path: Path, secret: bytes | None, purpose: str) -> bytes:
    """What `write` was given. Raises MptrainError as `unseal`."""
    content = path.read_bytes()
    return content if secret is None else unseal(secret, content, purpose)
