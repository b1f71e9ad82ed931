"""The key of encrypted data: 32 random bytes from a file, an environment variable or a command; never beside the data.

No message of this module holds a key, a part of one, or what a command printed.
"""

from __future__ import annotations

import base64
import binascii
import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

from mptrain.core.errors import DataError
from mptrain.recipe.data import Key

LENGTH = 32
_HOW = "A key is 32 random bytes: as they are, as 64 hexadecimal digits or in base64; `openssl rand -hex 32` makes one"
_SECONDS = 60  # a command that asks a person for a password takes a while


def read_key(key: Key, field: str, beside: Sequence[Path], *, allow_code: bool = False) -> bytes:
    """The 32 bytes.

    field: how messages name it. beside: what it opens; a key file may not lie in these folders or next to them.
    Raises DataError for a key that is not there or of another length, and for a command without allow_code.
    """
    if key.file is not None:
        path = Path(key.file).expanduser()
        _check_apart(path, field, beside)
        try:
            content = path.read_bytes()
        except OSError as error:
            raise DataError(f"{_place(field, 'file')}: {path.absolute()} cannot be read ({error.strerror}).") from None
        return _key(content, f"{_place(field, 'file')}: {path}")
    if key.env is not None:
        value = os.environ.get(key.env)
        if value is None:
            raise DataError(f"{_place(field, 'env')}: the environment variable {key.env} is not set.")
        return _key(os.fsencode(value), f"{_place(field, 'env')}: {key.env}")
    assert key.command is not None
    if not allow_code:
        raise DataError(f"{_place(field, 'command')}: it runs {key.command[0]}; allow that with --allow-code.")
    return _key(_printed(key.command, field), f"{_place(field, 'command')}: {key.command[0]}")


def _place(field: str, kind: str) -> str:
    """data.key.file of a recipe, --key-file of a command line."""
    return f"{field}-{kind}" if field.startswith("--") else f"{field}.{kind}"


def _printed(command: Sequence[str], field: str) -> bytes:
    """What a command prints. It gets no shell; what it says on stderr goes to the user's."""
    try:
        done = subprocess.run(list(command), stdout=subprocess.PIPE, timeout=_SECONDS, check=False)
    except OSError as error:
        raise DataError(f"{_place(field, 'command')}: {command[0]} cannot be run ({error.strerror}).") from None
    except subprocess.TimeoutExpired:
        raise DataError(f"{_place(field, 'command')}: {command[0]} printed no key in {_SECONDS} seconds.") from None
    if done.returncode:
        raise DataError(f"{_place(field, 'command')}: {command[0]} failed with exit status {done.returncode}.")
    return done.stdout


def _check_apart(path: Path, field: str, beside: Sequence[Path]) -> None:
    home = path.resolve().parent
    for folder in beside:
        data = folder.resolve()
        if home in (data, data.parent) or data in home.parents:
            raise DataError(
                f"{_place(field, 'file')}: {path} lies beside the data that it opens ({folder}), and whoever copies one"
                " copies both. Move the key to another folder, or give it by env or command."
            )


def _key(content: bytes, where: str) -> bytes:
    text = content.strip()
    if len(content) == LENGTH and not (content.isascii() and content.decode().isprintable()):
        return content
    try:
        if len(text) == 2 * LENGTH:
            return bytes.fromhex(text.decode("ascii"))
        found = base64.b64decode(text, validate=True)
        if len(text) == 44 and len(found) == LENGTH:
            return found
    except (ValueError, binascii.Error):
        pass
    raise DataError(f"{where} holds no key ({len(text)} bytes that are none of its forms). {_HOW}.")
