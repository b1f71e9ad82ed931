"""What the functions of `mptrain` return: frozen, and printed as tables."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import RenderableType


class Shown:
    """Prints itself as the commands print the same facts: in text, in a terminal of rich, and in a notebook."""

    def _parts(self) -> Iterable[RenderableType]:
        """Tables and lines, from top to bottom."""
        raise NotImplementedError

    def __rich__(self) -> RenderableType:
        from rich.console import Group

        return Group(*self._parts())

    def __str__(self) -> str:
        from mptrain.report.render.notebook import text

        return text(self.__rich__())

    __repr__ = __str__

    def _repr_html_(self) -> str:
        from mptrain.report.render.notebook import html

        return html(self.__rich__())
