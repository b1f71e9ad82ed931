"""What a run keeps of private examples, encrypted under the secret of their data, which no run folder holds."""

from __future__ import annotations

import secrets

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
