"""Write docs/recipes.md from the recipe's schema: `python scripts/recipe_docs.py` (`--check` only compares)."""

from __future__ import annotations

import sys
import types
import typing
from pathlib import Path

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from mptrain import recipe
from mptrain.recipe.base import OneOf
from scripts import targets

TARGET = Path(__file__).resolve().parent.parent / "docs" / "recipes.md"
INTRO = """# Recipes, field by field

Made from the schema by `scripts/recipe_docs.py`. A recipe is one YAML file; unknown fields are errors. Numbers and
booleans are read as YAML 1.2 does (`1e-5` is a number, `off` is a word). `--set a.b.c=value` replaces a value on the
command line; stages and exports are addressed by their id: `--set stages.jpqd.train.lr=1e-5`.

Patterns in `ignore` and `bits` name torch modules (`encoder.layer.3`), or are regular expressions after `re:`. The same
spelling holds for pruning, torch quantization and the exported model; a pattern that matches nothing is an error.

Paths are relative to the folder the command runs in.
"""


def sections() -> list[type[BaseModel]]:
    """Every model of the schema in the order it is first used."""
    found: list[type[BaseModel]] = []

    def visit(model: type[BaseModel]) -> None:
        if model in found:
            return
        found.append(model)
        for field in model.model_fields.values():
            for inner in _models(field.annotation):
                visit(inner)

    visit(recipe.Recipe)
    return found


def _models(annotation: typing.Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if union := next((a for a in typing.get_args(annotation) if isinstance(a, OneOf)), None):
        return list(union.members.values())
    return [m for a in typing.get_args(annotation) for m in _models(a)]


def _type(annotation: typing.Any, schema: dict) -> str:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return f"[{annotation.__name__}](#{annotation.__name__.lower()})"
    if origin is typing.Annotated:
        if isinstance(arguments[1], OneOf):
            members = dict.fromkeys(arguments[1].members.values())  # one class may have several names
            return " or ".join(_type(member, schema) for member in members)
        return _type(arguments[0], schema)
    if origin is typing.Literal:
        return ", ".join(f"`{a}`" for a in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_type(a, schema) for a in arguments if a is not type(None))
    if origin is list:
        return f"list of {_type(arguments[0], schema)}"
    if origin in (dict, tuple):
        return f"{'mapping' if origin is dict else 'pair'} of {_type(arguments[-1], schema)}"
    return {"str": "text", "int": "whole number", "float": "number", "bool": "true or false", "Any": "values"}.get(
        getattr(annotation, "__name__", ""), str(annotation)
    )


def _default(field: typing.Any) -> str:
    value = field.get_default(call_default_factory=True)
    if field.is_required() or value is PydanticUndefined:
        return "**required**"
    if value in (None, "", [], {}):
        return ""
    if isinstance(value, BaseModel):
        return "see there"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _columns() -> str:
    """What each task reads of `data:`, from its row of TASKS."""
    rows = ["### Columns\n", "Fields of `data:` too; each names a column.\n", "| task | field | holds | default |"]
    rows.append("|---|---|---|---|")
    for kind in recipe.TASKS.values():
        for name, column in kind.columns.items():
            default = f"`{column.default}`" if column.default else "not read"
            holds = column.holds.replace("|", "\\|")
            rows.append(f"| `{kind.name}` | `{name}` | {holds} | {default} |")
    return "\n".join(rows) + "\n"


def render() -> str:
    text = [INTRO]
    for model in sections():
        text.append(f"## {model.__name__}\n")
        if model.__doc__ and model is not recipe.Recipe:
            text.append(" ".join(model.__doc__.split()) + "\n")
        text.append("| field | value | default | |\n|---|---|---|---|")
        schema = model.model_json_schema(by_alias=True)
        for name, field in model.model_fields.items():
            names = schema["properties"].get(field.alias or name, {}).get("enum")
            kind = ", ".join(f"`{n}`" for n in names) if names else _type(field.annotation, schema)
            cells = [f"`{field.alias or name}`", kind, _default(field)]
            cells.append(field.description or "")
            text.append("| " + " | ".join(c.replace("|", "\\|") for c in cells) + " |")
        text.append("")
        if model is recipe.Data:
            text.append(_columns())
    return "\n".join([*text, targets.markdown()])


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(0 if TARGET.read_text() == render() else "docs/recipes.md is stale: run scripts/recipe_docs.py")
    TARGET.write_text(render())
