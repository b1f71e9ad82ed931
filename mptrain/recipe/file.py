"""Reading a recipe: strict YAML with line numbers, overrides by id, errors that name the fix.

YAML 1.1 has traps that turn a recipe into another one in silence: `1e-5` is a string, a
duplicate key keeps the last value, `off` is False. The loader here reads numbers and
booleans as YAML 1.2 does, refuses duplicate keys and knows the line of every value.
"""

from __future__ import annotations

import copy
import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from mptrain.core.errors import RecipeError
from mptrain.recipe import Recipe
from mptrain.recipe.explain import Path_, explain, names, short
from mptrain.recipe.family import expanded, points_of
from mptrain.recipe.plan import variants

_LISTS_BY_ID = ("stages", "export")
PRESET = "preset"
"""the key of --set that names one"""
_NUMBER = re.compile(r"[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$")
_WORDS = {"true": True, "false": False, "null": None, "~": None, "": None}


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
        raise RecipeError(f"{path}: a recipe is a mapping that starts with 'schema: mptrain/v1', got {short(data)}.")
    written = copy.deepcopy(data)
    for override in overrides or []:
        _override(data, override)
    found = RecipeFile(path, text, validate(data, str(path), lines))
    _check_presets(written, found)
    return found


def validate(data: dict[str, Any], source: str, lines: dict[Path_, int] | None = None) -> Recipe:
    """The recipe in plain data. lines: of its keys in the file. Raises RecipeError, also for an export of nothing."""
    data, lines = expanded(data, source, lines or {})
    try:
        recipe = Recipe.model_validate(data)
    except ValidationError as error:
        raise RecipeError("\n".join(explain(item, data, source, lines) for item in error.errors())) from None
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
    if path.strip() == PRESET:
        _use_preset(data, value)
        return
    _set(data, path, value)


def _use_preset(data: dict[str, Any], name: Any) -> None:
    """Apply what `presets` holds under a name."""
    presets = data.get("presets")
    known = presets if isinstance(presets, dict) else {}
    if not isinstance(name, str) or not isinstance(known.get(name), dict):
        hint = f"the recipe's are {', '.join(known)}" if known else "the recipe has none"
        raise RecipeError(f"--set {PRESET}={name}: there is no such preset; {hint}.")
    for path, value in known[name].items():
        _set(data, path, copy.deepcopy(value))


def _check_presets(data: dict[str, Any], found: RecipeFile) -> None:
    """Each preset makes a recipe of this one. data: of the file, without overrides; one that needs some is let pass."""
    for name in found.recipe.presets:
        changed = copy.deepcopy(data)
        try:
            validate(data, str(found.path))
        except RecipeError:
            return
        try:
            _use_preset(changed, name)
            validate(changed, str(found.path))
        except RecipeError as error:
            raise RecipeError(f"{found.path}: presets.{name}: {error}") from None


def _set(data: dict[str, Any], path: str, value: Any) -> None:
    """At a dotted path."""
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
            raise RecipeError(f"--set {path}: {'.'.join(keys[: depth + 1])} is {short(here)}, it has no fields.")
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
    families = [i["id"] for i in items if isinstance(i, dict) and points_of(i) and key.startswith(f"{i.get('id')}-")]
    if families:
        hint = f" The points of a family come from {families[0]!r}: set its fields, which all of them have."
    raise RecipeError(f"--set {path}: no item with id {key!r}; ids are {ids}.{hint}")


def _set_hint(keys: list[str], data: dict[str, Any]) -> str:
    stages = [s["id"] for s in data.get("stages") or [] if isinstance(s, dict) and isinstance(s.get(keys[0]), dict)]
    if stages:
        return " Did you mean " + " or ".join(f"stages.{s}.{'.'.join(keys)}" for s in stages) + "?"
    near = difflib.get_close_matches(keys[0], names(Recipe), 1)
    return f" Did you mean {near[0]!r}?" if near else f" Fields: {', '.join(names(Recipe))}."
