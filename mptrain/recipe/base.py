"""What all parts of a recipe share: strictness, the types of names, and unions that others may add to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, GetCoreSchemaHandler, StringConstraints
from pydantic_core import CoreSchema, core_schema


def _no_folder(name: str) -> str:
    if name in (".", ".."):
        raise ValueError(f"{name!r} is no name, for folders are called after it; give it a letter")
    return name


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
