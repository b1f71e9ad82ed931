"""Reading a recipe: strict YAML with line numbers, overrides by id, errors that name the fix.

YAML 1.1 has traps that turn a recipe into another one in silence: `1e-5` is a string, a
duplicate key keeps the last value, `off` is False. The loader here reads numbers and
booleans as YAML 1.2 does, refuses duplicate keys and knows the line of every value.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from mptrain.core.errors import RecipeError
from mptrain.recipe import Recipe
from mptrain.recipe.base import OneOf, Strict
from mptrain.recipe.plan import variants

_LISTS_BY_ID = ("stages", "export")
_TAGS = ("method", "mode", "format")
"""fields that say which member of a union an entry is"""
_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}
_NOT_BOOLEAN = {"yes": "true", "on": "true", "no": "false", "off": "false"}

Path_ = tuple[str | int, ...]


@dataclass(frozen=True)
class RecipeFile:
    path: Path
    text: str
    recipe: Recipe


def folder(kind: str) -> Path:
    """The bundled "recipes" or "configs": inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parent.parent
    inside = package / kind
    return inside if inside.is_dir() else package.parent / kind


def bundled() -> list[Path]:
    return sorted(folder("recipes").glob("*.yaml"))


def configs() -> list[Path]:
    """The bundled files for `accelerate launch --config_file`."""
    return sorted(folder("configs").glob("*.yaml"))


def find(name: str) -> Path:
    """A local file first, then a bundled recipe; the ending .yaml may be left out."""
    local = [Path(name), Path(f"{name}.yaml")]
    for path in local:
        if path.is_file():
            return path
    stem = Path(name).name.removesuffix(".yaml")
    names = [p.stem for p in bundled()]
    if stem in names and Path(name).name == name:
        return folder("recipes") / f"{stem}.yaml"
    near = difflib.get_close_matches(stem, names, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise RecipeError(
        f"No recipe {name!r}: there is no such file in {Path.cwd()} and no bundled recipe of that name.{hint}"
        f" Bundled recipes: {', '.join(names)}."
    )


def read(name: str, overrides: list[str] | None = None) -> RecipeFile:
    """Find, parse and validate a recipe.

    name: of a file, or of a bundled recipe, with or without .yaml. overrides: "KEY=VALUE" as `--set` takes them, later
    ones win. Raises RecipeError with file, line, value and fix.
    """
    path = find(name)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{path}: cannot be read: {error}") from None
    data, lines = parse(text, str(path))
    if not isinstance(data, dict):
        raise RecipeError(f"{path}: a recipe is a mapping that starts with 'schema: mptrain/v1', got {_short(data)}.")
    for override in overrides or []:
        _override(data, override)
    return RecipeFile(path, text, validate(data, str(path), lines))


def validate(data: dict[str, Any], source: str, lines: dict[Path_, int] | None = None) -> Recipe:
    """The recipe in plain data. lines: of its keys in the file. Raises RecipeError, also for an export of nothing."""
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(_explain(item, data, source, lines or {}) for item in error.errors())) from None
    try:
        variants(recipe)
    except RecipeError as error:
        raise RecipeError(f"{source}: {error}") from None
    return recipe


def parse(text: str, source: str) -> tuple[Any, dict[Path_, int]]:
    """Parse YAML to plain data and the line of every key path. Raises RecipeError."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        lines: dict[Path_, int] = {}
        return (None if node is None else _value(node, (), lines, source, set())), lines
    except RecursionError:
        raise RecipeError(f"{source}: is nested too deeply for a recipe.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{source}:{mark.line + 1}" if mark else source
        problem = getattr(error, "problem", None) or str(error)
        raise RecipeError(f"{where}: not valid YAML: {problem}. Check indentation, colons and quotes there.") from None


def _value(node: yaml.Node, path: Path_, lines: dict[Path_, int], source: str, parents: set[int]) -> Any:
    line = node.start_mark.line + 1
    lines.setdefault(path, line)
    if id(node) in parents:
        raise RecipeError(f"{source}:{line}: an alias refers to itself; write the value out.")
    if isinstance(node, yaml.MappingNode):
        mapping: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key_line = key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise RecipeError(f"{source}:{key_line}: keys are plain words, got {type(key_node).__name__}.")
            key = key_node.value
            if key in mapping:
                raise RecipeError(
                    f"{source}:{key_line}: the key {key!r} appears twice in the same mapping"
                    f" (first on line {lines[(*path, key)]}); YAML would keep only the last. Remove one."
                )
            lines[(*path, key)] = key_line
            mapping[key] = _value(value_node, (*path, key), lines, source, parents | {id(node)})
        return mapping
    if isinstance(node, yaml.SequenceNode):
        return [_value(n, (*path, i), lines, source, parents | {id(node)}) for i, n in enumerate(node.value)]
    if node.tag.startswith("!") or (":python" in node.tag):
        raise RecipeError(f"{source}:{line}: the tag {node.tag!r} is not allowed; a recipe holds plain values only.")
    assert isinstance(node, yaml.ScalarNode)
    return node.value if node.style in ("'", '"', "|", ">") else scalar(node.value)


def scalar(word: str) -> Any:
    """A plain YAML 1.2 scalar: number, boolean, null or string."""
    if word.lower() in _WORDS:
        return _WORDS[word.lower()]
    if _NUMBER.match(word):
        return float(word) if re.search(r"[.eE]", word) else int(word)
    return word


def _override(data: dict[str, Any], text: str) -> None:
    """Apply "a.b.c=value"; items of `stages` and `export` are addressed by their id."""
    path, equals, raw = text.partition("=")
    if not equals or not path.strip():
        raise RecipeError(f"--set {text!r}: write KEY=VALUE, e.g. --set stages.jpqd.train.lr=1e-5.")
    value, _ = parse(raw, f"--set {path}")
    keys = _keys(path.strip().split("."), data)
    if keys[0] in Recipe.model_fields or any(f.alias == keys[0] for f in Recipe.model_fields.values()):
        pass
    else:
        raise RecipeError(f"--set {path}: {keys[0]!r} is not a field of a recipe.{_set_hint(keys, data)}")
    here: Any = data
    for depth, key in enumerate(keys[:-1]):
        if isinstance(here, list):
            here = _item(here, key, path)
        else:
            if not isinstance(here.get(key), dict | list):
                here[key] = {}
            here = here[key]
        if not isinstance(here, dict | list):
            raise RecipeError(f"--set {path}: {'.'.join(keys[: depth + 1])} is {_short(here)}, it has no fields.")
    last = keys[-1]
    if isinstance(here, list):
        index = here.index(_item(here, last, path))
        here[index] = value
    else:
        here[last] = value


def _keys(words: list[str], data: Any) -> list[str]:
    """The keys of a dotted path: an id may hold dots itself, and the longest that there is counts."""
    keys, here = [], data
    while words:
        known = [i.get("id") for i in here if isinstance(i, dict)] if isinstance(here, list) else []
        count = next((n for n in range(len(words), 0, -1) if ".".join(words[:n]) in known), 1)
        keys.append(".".join(words[:count]))
        words = words[count:]
        if isinstance(here, list):
            here = here[known.index(keys[-1])] if keys[-1] in known else None
        else:
            here = here.get(keys[-1]) if isinstance(here, dict) else None
    return keys


def _item(items: list[Any], key: str, path: str) -> Any:
    ids = [i.get("id") for i in items if isinstance(i, dict)]
    for item in items:
        if isinstance(item, dict) and item.get("id") == key:
            return item
    if key.isdigit() and int(key) < len(items):
        return items[int(key)]
    near = difflib.get_close_matches(key, [str(i) for i in ids], 1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    raise RecipeError(f"--set {path}: no item with id {key!r}; ids are {ids}.{hint}")


def _set_hint(keys: list[str], data: dict[str, Any]) -> str:
    stages = [s["id"] for s in data.get("stages") or [] if isinstance(s, dict) and isinstance(s.get(keys[0]), dict)]
    if stages:
        return " Did you mean " + " or ".join(f"stages.{s}.{'.'.join(keys)}" for s in stages) + "?"
    near = difflib.get_close_matches(keys[0], _names(Recipe), 1)
    return f" Did you mean {near[0]!r}?" if near else f" Fields: {', '.join(_names(Recipe))}."


def _names(model: type[BaseModel]) -> list[str]:
    return model.field_names() if issubclass(model, Strict) else list(model.model_fields)


def _explain(item: Any, data: Any, source: str, lines: dict[Path_, int]) -> str:
    """One validation error as "file:line: field: what is wrong, what was received, what to write"."""
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
    return f"{where}: {field}: {message[0].lower() + message[1:]}, got {_short(received)}.{hint}"


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
    return list(dict.fromkeys(n for m in models for n in _names(m)))


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if union := next((a for a in typing.get_args(annotation) if isinstance(a, OneOf)), None):
        return list(union.members.values())
    if typing.get_origin(annotation) in (typing.Union, types.UnionType, list, dict, typing.Annotated):
        return [m for a in typing.get_args(annotation) for m in _models_in(a)]
    return []


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
