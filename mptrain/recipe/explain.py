"""What is wrong with a recipe: a validation error as one sentence with file, line, value and fix."""

from __future__ import annotations

import difflib
import re
import types
import typing
from typing import Any

from pydantic import BaseModel

from mptrain.recipe import Recipe
from mptrain.recipe.base import OneOf, Strict

Path_ = tuple[str | int, ...]
_TAGS = ("method", "mode", "format")
"""fields that say which member of a union an entry is"""
_NOT_BOOLEAN = {"yes": "true", "on": "true", "no": "false", "off": "false"}


def explain(item: Any, data: Any, source: str, lines: dict[Path_, int]) -> str:
    """One validation error as "file:line: field: what is wrong, what was received, what to write".

    item: of pydantic's `errors()`. data: that was validated. lines: of its keys in the file.
    """
    loc = _locate(item["loc"], data)
    line = next((lines[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in lines), None)
    where = f"{source}:{line}" if line else source
    field = ".".join(_step(data, loc, n) for n in range(len(loc))) or "recipe"
    kind, message = item["type"], item["msg"].removeprefix("Value error, ")
    if kind == "extra_forbidden":
        allowed = _fields_at(loc[:-1], data)
        near = difflib.get_close_matches(str(loc[-1]), allowed, 1, 0.5)
        hint = f"Did you mean {near[0]!r}?" if near else f"Known fields: {', '.join(allowed)}."
        return f"{where}: {field}: unknown field. {hint}"
    if kind == "missing":
        return f"{where}: {field}: this field is required. Add '{loc[-1]}: …' there."
    if kind == "union_tag_not_found":
        tag = item["ctx"]["discriminator"].strip("'")
        return f"{where}: {field}: the field {tag!r} is required here. Add '{tag}: …'."
    if kind == "union_tag_invalid":
        tag, expected = item["ctx"]["discriminator"].strip("'"), item["ctx"]["expected_tags"]
        near = difflib.get_close_matches(str(item["ctx"]["tag"]), re.findall(r"'([^']+)'", expected), 1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        return f"{where}: {field}.{tag}: must be one of {expected}, got {item['ctx']['tag']!r}.{hint}"
    if kind == "value_error":
        return f"{where}: {message if message.startswith(('stages.', 'export')) else f'{field}: {message}'}."
    if kind == "string_pattern_mismatch":
        message = "must match [a-z0-9._-]+ (lower-case letters, digits, dot, underscore, hyphen)"
    received = item.get("input")
    hint = ""
    if isinstance(received, str):
        choices = re.findall(r"'([^']+)'", item.get("ctx", {}).get("expected", ""))
        near = difflib.get_close_matches(received, choices, 1)
        if near:
            hint = f" Did you mean {near[0]!r}?"
        elif kind.startswith("bool") and received.lower() in _NOT_BOOLEAN:
            hint = f" Write {_NOT_BOOLEAN[received.lower()]}."
    return f"{where}: {field}: {message[0].lower() + message[1:]}, got {short(received)}.{hint}"


def _locate(loc: Path_, data: Any) -> Path_:
    """Drop the union tags that pydantic puts between keys ("fisher" in stages.0.prune.fisher.keep)."""
    path: list[str | int] = []
    here = data
    for n, key in enumerate(loc):
        last = n == len(loc) - 1
        if isinstance(here, dict) and key not in here and not last:
            continue
        if isinstance(here, dict) and key not in here and key in map(here.get, _TAGS):
            continue
        path.append(key)
        if isinstance(here, dict):
            here = here.get(key)
        elif isinstance(here, list) and isinstance(key, int) and key < len(here):
            here = here[key]
        else:
            here = None
    return tuple(path)


def _step(data: Any, loc: Path_, n: int) -> str:
    """Key n of a path, items of lists by their id."""
    here: Any = data
    last: Any = loc[n]
    for key in loc[:n]:
        try:
            here = here[key]
        except (KeyError, IndexError, TypeError):
            return str(last)
    if isinstance(here, list) and isinstance(last, int) and last < len(here) and isinstance(here[last], dict):
        return str(here[last].get("id", last))
    return str(last)


def _fields_at(loc: tuple[Any, ...], data: Any) -> list[str]:
    """The fields allowed at a path, following the schema and, in unions, the tag given."""
    models: list[type[BaseModel]] = [Recipe]
    here: Any = data
    mapping = False  # the next key is the user's own
    for key in loc:
        here = here[key] if isinstance(here, dict | list) else None
        if isinstance(key, int) or mapping:
            mapping = False
            continue
        found: list[type[BaseModel]] = []
        for model in models:
            for name, info in model.model_fields.items():
                if key in (name, info.alias):
                    found += _models_in(info.annotation)
                    mapping = typing.get_origin(info.annotation) is dict
        models = found
    if len(models) > 1 and isinstance(here, dict):
        tagged = [
            m
            for m in models
            for tag in _TAGS
            if tag in m.model_fields and here.get(tag) in typing.get_args(m.model_fields[tag].annotation)
        ]
        models = tagged or models
    return list(dict.fromkeys(n for m in models for n in names(m)))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if union := next((a for a in typing.get_args(annotation) if isinstance(a, OneOf)), None):
        return list(union.members.values())
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, typing.Annotated):
        return [m for a in typing.get_args(annotation) for m in _models_in(a)]
    return []


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"


def names(model: type[BaseModel]) -> list[str]:
    return model.field_names() if issubclass(model, Strict) else list(model.model_fields)
