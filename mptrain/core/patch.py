"""Attributes of other packages' objects, and what modules compute, replaced for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def replaced(owner: Any, **attributes: Any) -> Iterator[None]:
    saved = {name: owner.__dict__[name] for name in attributes}
    try:
        for name, value in attributes.items():
            setattr(owner, name, value)
        yield
    finally:
        for name, value in saved.items():
            setattr(owner, name, value)


@contextmanager
def computing(modules: Iterable[Any], forward: Callable[..., Any]) -> Iterator[None]:
    """These modules compute `forward`; afterwards what they did before, also an attribute of their own."""
    saved = [(module, module.__dict__.get("forward")) for module in modules]
    try:
        for module, _ in saved:
            module.forward = forward
        yield
    finally:
        for module, own in saved:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.forward = own
