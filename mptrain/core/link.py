"""Hooks that belong to the masters of a model, and are known by that."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class Link:
    """A hook that calls `act` with what torch gives it; a copy of the model (EMA, a teacher) is made without it."""

    # no __dict__, which torch would copy into its own wrapper; the second is torch's mark of a state-dict hook
    __slots__ = ("_act", "_from_public_api")

    _asleep = 0

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> Any:
        return None if Link._asleep else self._act(*args)


@contextmanager
def asleep() -> Iterator[None]:
    """Within it, models run as if they had no masters: on other values than theirs, in float32."""
    Link._asleep += 1
    try:
        yield
    finally:
        Link._asleep -= 1


def is_link(hook: Any) -> bool:
    return isinstance(hook, Link) or isinstance(getattr(hook, "hook", None), Link)  # some hooks torch wraps
