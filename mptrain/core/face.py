"""A package that can also be called: `mptrain.export` is the package of the formats, and the function of that name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import import_module
from types import ModuleType
from typing import Any


def callable_package(name: str, home: str) -> None:
    """Calling the package of that name calls `home`, "module:function", which is imported when it is first used."""

    class Package(ModuleType):
        @property
        def __wrapped__(self) -> Callable[..., Any]:
            """The function; `inspect.signature` reads it."""
            module, _, function = home.partition(":")
            return getattr(import_module(module), function)

        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return self.__wrapped__(*args, **kwargs)

    sys.modules[name].__class__ = Package
