"""Which members of a parameter run in `make test`; the others are long."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def except_for(values: Iterable[Any], quick: Collection[Any]) -> list[Any]:
    """The values for pytest.mark.parametrize, of several names if they are tuples; all but `quick` are long."""
    return [
        value
        if value in quick
        else pytest.param(*(value if isinstance(value, tuple) else (value,)), marks=pytest.mark.long)
        for value in values
    ]
