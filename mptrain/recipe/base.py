"""What all parts of a recipe share: strictness, the types of names, and unions that others may add to."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, StringConstraints
from pydantic_core import CoreSchema, core_schema


def _no_folder(name: str) -> str:
    if name in (".", ".."):
        raise ValueError(f"{name!r} is no name, for folders are called after it; give it a letter")
    return name


def _possible(path: str) -> str:
    """What no file system can hold, pathlib raises about in ways of its own wherever it is asked for."""
    if "\0" in path:
        raise ValueError(f"{path[:40]!r} holds a NUL character, which no path does; remove it")
    encoded = path.encode("utf-8", "surrogatepass")
    longest = max(re.split(rb"[/\\]", encoded), key=len)
    if len(longest) > 255 or len(encoded) > 4000:
        raise ValueError(f"{path[:40]!r}… is {len(encoded)} bytes long, more than a path can be; give the right one")
    if path.startswith("~"):
        try:
            Path(path).expanduser()
        except RuntimeError:
            raise ValueError(f"{path[:40]!r} names a home folder that is not there; write the whole path") from None
    return path


PathText = Annotated[str, AfterValidator(_possible)]
"""a path, or a name where a path may stand"""
Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]+$", max_length=100), AfterValidator(_no_folder)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def field_names(cls) -> list[str]:
        """What a file may write here."""
        return [field.alias or name for name, field in cls.model_fields.items()]


class OneOf:
    """In Annotated[Base, OneOf(field, members)]: one of the members, whichever the field names.

    members: by the value of the field; a program may add to them (mptrain.extend), and then builds the models that
    hold such a union anew: `Recipe.model_rebuild(force=True)`.
    """

    def __init__(self, field: str, members: Mapping[str, type[Strict]]) -> None:
        self.field, self.members = field, members

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        choices = {tag: handler.generate_schema(member) for tag, member in self.members.items()}
        return core_schema.tagged_union_schema(choices, discriminator=self.field)
