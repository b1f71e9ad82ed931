"""Hooks that belong to the masters of a model, and are known by that."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


class Link:
    """A hook that calls `act` with what torch gives it; a copy of the model (EMA, a teacher) is made without it."""

    # no __dict__, which torch would copy into its own wrapper; the second is torch's mark of a state-dict hook
    __slots__ = ("_act", "_from_public_api")

    def __init__(self, act: Callable[..., Any]) -> None:
        self._act = act

    def __call__(self, *args: Any) -> Any:
        return self._act(*args)


def is_link(hook: Any) -> bool:
    return isinstance(hook, Link) or isinstance(getattr(hook, "hook", None), Link)  # some hooks torch wraps
