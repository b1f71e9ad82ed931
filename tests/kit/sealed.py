"""Encrypted copies of data, and a key in the environment that opens them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mptrain.data.sealed import write

KEY = bytes(range(100, 132))
VARIABLE = "MPTRAIN_TEST_KEY"
WHERE = {"env": VARIABLE}


def encrypted(source: Path, cipher: str = "aes-256-gcm") -> Path:
    """An encrypted copy beside a file or a folder."""
    target = source.with_name(f"{source.name}.sealed")
    write.encrypt(source, target, KEY, cipher)
    return target


def private(data: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The `data:` of a recipe whose files lie in `folder`, reading an encrypted copy of that folder."""
    sealed = encrypted(folder)
    files = {name: str(sealed / Path(data[name]).relative_to(folder)) for name in ("train", "test") if name in data}
    return {**data, **files, "key": WHERE}
