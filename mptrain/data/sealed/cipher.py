"""Authenticated encryption of numbered pieces, AES-256-GCM or ChaCha20-Poly1305 of the package `cryptography`.

    key of a purpose = HKDF-SHA256(key, salt, purpose)          salt: 32 random bytes, new with every writing
    piece n          = cipher(key of a purpose, nonce = n, plaintext, associated data)

A salt is never used twice, so neither is a nonce with one key. What a piece is (its number, its shard) is associated
data: in another place it does not open.
"""

from __future__ import annotations

import hmac
from typing import Any

from mptrain.core.errors import MptrainError

CIPHERS = {"aes-256-gcm": "AESGCM", "chacha20-poly1305": "ChaCha20Poly1305"}
"""by name, their classes in cryptography.hazmat.primitives.ciphers.aead"""
TAG = 16
"""bytes that a piece grows by"""


class Damaged(MptrainError):
    """A piece does not open: it was changed, or moved, or another key wrote it."""


class Cipher:
    """For the pieces of one purpose. salt: bytes; pieces are numbered from 0."""

    def __init__(self, name: str, key: bytes, salt: bytes, purpose: str) -> None:
        from cryptography.hazmat.primitives.ciphers import aead

        self._cipher: Any = getattr(aead, CIPHERS[name])(derive(key, salt, purpose))

    def seal(self, number: int, content: bytes, about: bytes) -> bytes:
        return self._cipher.encrypt(number.to_bytes(12, "big"), content, about)

    def open(self, number: int, sealed: bytes, about: bytes) -> bytes:
        """Raises Damaged."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(number.to_bytes(12, "big"), sealed, about)
        except InvalidTag:
            raise Damaged(f"piece {number} does not open") from None


def derive(key: bytes, salt: bytes, purpose: str) -> bytes:
    """A key of 32 bytes for one purpose: HKDF of RFC 5869."""
    from cryptography.hazmat.primitives.hashes import SHA256
    from cryptography.hazmat.primitives.kdf.hkdf import HKDF

    return HKDF(SHA256(), 32, salt, f"mptrain {purpose}".encode()).derive(key)


def check_value(key: bytes, salt: bytes) -> str:
    """Tells a wrong key from a damaged file; says nothing of the key."""
    return hmac.digest(derive(key, salt, "check"), b"key", "sha256")[:8].hex()
