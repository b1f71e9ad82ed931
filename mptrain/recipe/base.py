"""What all parts of a recipe share: strictness and the types of names."""

from __future__ import annotations

from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints


def _no_folder(name: str) -> str:
    if name in (".", ".."):
        raise ValueError(f"{name!r} is no name, for folders are called after it; give it a letter")
    return name


Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9._-]+$", max_length=100), AfterValidator(_no_folder)]
Fraction = Annotated[float, Field(gt=0, le=1)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)
