"""What messages may say of the data: of encrypted data no cell, no part of one, and nothing that a decoder says of one.

One switch for the process, thrown by whoever reads encrypted data, and never back: messages come from places that see
a value and not where it is from, in threads and long after it was read too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

NOT_SHOWN = "(not shown: the data is encrypted)"

_hidden = False


def hide() -> None:
    """From now on, messages of this process quote no cells."""
    global _hidden
    _hidden = True


def hidden() -> bool:
    return _hidden


def shown(value: Any) -> str:
    """A value as messages quote it."""
    return f"a value {NOT_SHOWN}" if _hidden else repr(value)


def listed(names: Iterable[str]) -> str:
    """Names that are, or may be, cells: labels, or the header of a file that has none."""
    names = list(names)
    return f"{len(names)} {NOT_SHOWN}" if _hidden else ", ".join(names)


def reason(error: BaseException) -> str:
    """What a library says of a value that it cannot read."""
    return type(error).__name__ if _hidden else f"{type(error).__name__}: {error}"
