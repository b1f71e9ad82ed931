"""Recipes as people, editors and malice leave them: case n is the same on every machine."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import yaml

JUNK: list[Any] = [
    None, True, False, 0, -1, 1, 2**63, -(2**63), 10**400, 0.0, -0.5, 1e-5, 1e308, float("inf"), float("nan"), "", " ",
    "off", "1e-5", "\u0000", "\ud7ff", "é" * 300, "../..", "/dev/null", "~", "packaged:", "packaged:none", "a/b", "a b",
    "re:(", "re:" + "(a+)+" * 3 + "$", [], [[]], [None], {}, {"": None}, {"a": {"b": []}}, [1, "a", None], "model",
    "self", "x" * 10_000,
]  # fmt: skip
WORDS = [
    "fp32",
    "fp16",
    "int8",
    "compressed",
    "eager",
    "model",
    "self",
    "re:.*",
    "embeddings",
    "column 1",
    "O",
    "iOS15",
]
METHODS: list[dict[str, Any]] = [
    {"quantize": {"mode": "ptq"}},
    {"quantize": {"mode": "qat", "bits": {"re:.*": 4}}},
    {"quantize": {"mode": "weight_only", "method": "gptq", "block_size": 8}},
    {"quantize": {"mode": "weight_only", "method": "rtn", "size_budget": 4.7}},
    {"palettize": {"method": "kmeans", "bits": 2, "cluster_dim": 2}},
    {"palettize": {"method": "skm", "size_budget": 3.0}},
    {"prune": {"method": "movement", "keep": {"encoder_params": 0.5}, "schedule": {"end": 1}}},
    {"prune": {"method": "magnitude", "keep": {"heads": 0.5, "ffn": 0.5}, "schedule": {"end": 0}}},
    {"prune": {"method": "fisher", "keep": {"macs": 0.4}, "schedule": {"end": 1}}},
    {"prune": {"method": "curvature", "keep": {"encoder_params": 0.5}}},
    {"teacher": "self", "distill": {"weight": 0.5, "hidden": 1.0, "attention": 1.0}},
    {"teacher": "model", "distill": {"weight": 1.0}},
]
LINES = [
    "unknown: 1", "  - {id: x}", "\t- tab", "schema: mptrain/v2", "stages: []", "stages: &a [*a]", "a: &a [1]",
    "<<: *a", "? [complex, key]\n: 1", "!!python/object/apply:os.system [true]", "name: !!binary aGk=", "---",
    "...", "%YAML 1.1", "'unclosed", "{", "]", ": :", "- - - -", "# comment", "date: 2020-01-01", "n: 0x10",
    "n: 1_000", "n: 12:30:45",
]  # fmt: skip


def case(number: int, texts: list[str]) -> str:
    """The text of the broken recipe `number`, made of one of `texts`, whole recipes."""
    draw = random.Random(f"recipe {number}")
    text = draw.choice(texts)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        text = draw.choice((_of_values, _of_values, _of_values, _of_lines, _of_characters))(draw, text)
    return text


def mild(number: int, texts: list[str]) -> str:
    """A recipe that mostly still says something: numbers and words of the same kind, or an entry less."""
    draw = random.Random(f"mild {number}")
    data = yaml.safe_load(draw.choice(texts))
    for _ in range(draw.choice((1, 2, 3))):
        places = [(holder, key) for holder, key in _places(data) if not isinstance(holder[key], dict)]
        holder, key = draw.choice(places)
        value = holder[key]
        if draw.random() < 0.15:
            del holder[key]
        elif isinstance(value, bool):
            holder[key] = not value
        elif isinstance(value, int):
            holder[key] = draw.choice((0, 1, 2, 3, 7, value * 2, value * 10, value // 2, value + 1, 10**6))
        elif isinstance(value, float):
            holder[key] = draw.choice((0.0, 1.0, value * 2, value / 10, 1 - value, 1e-9, 0.999))
        elif isinstance(value, list):
            holder[key] = draw.choice((value * 2, value[:1], value[::-1], []))
        else:
            words = [h[k] for h, k in _places(data) if isinstance(h[k], str)]
            holder[key] = draw.choice((*words, *WORDS))
    if draw.random() < 0.5 and isinstance(data.get("stages"), list) and data["stages"]:
        stage = draw.choice(data["stages"])
        if isinstance(stage, dict):
            stage |= copy.deepcopy(draw.choice(METHODS))
    return yaml.safe_dump(data, sort_keys=False)


def _of_values(draw: random.Random, text: str) -> str:
    """One value replaced, dropped, moved or doubled."""
    try:
        data = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return _of_lines(draw, text)
    places = list(_places(data))
    if not places:
        return _of_lines(draw, text)
    holder, key = draw.choice(places)
    what = draw.randrange(5)
    if what == 0:
        del holder[key]
    elif what == 1 and isinstance(holder, dict):
        holder[draw.choice((f"{key}s", f"x{key}", str(key).upper(), 7))] = holder.pop(key)
    elif what == 2:
        other, there = draw.choice(places)
        if not _inside(other[there], holder):
            holder[key] = copy.deepcopy(other[there])
    else:
        holder[key] = draw.choice(JUNK)
    try:
        return yaml.safe_dump(data, sort_keys=False, allow_unicode=True)
    except (yaml.YAMLError, ValueError, TypeError, RecursionError):
        return text


def _places(data: Any, depth: int = 0) -> Any:
    """Every entry, with what holds it; an anchor may make data hold itself."""
    if depth > 20:
        return
    items = list(data.items()) if isinstance(data, dict) else list(enumerate(data)) if isinstance(data, list) else []
    for key, value in items:
        yield data, key
        yield from _places(value, depth + 1)


def _inside(value: Any, holder: Any) -> bool:
    return value is holder or any(value_ is holder for place, key in _places(value) for value_ in (place, place[key]))


def _of_lines(draw: random.Random, text: str) -> str:
    lines = text.splitlines() or [""]
    at = draw.randrange(len(lines))
    changes: list[Callable[[], Any]] = [
        lambda: lines.pop(at),
        lambda: lines.insert(at, lines[at]),
        lambda: lines.insert(at, draw.choice(LINES)),
        lambda: lines.__setitem__(at, "  " + lines[at]),
        lambda: lines.__setitem__(at, lines[at].lstrip()),
        lambda: draw.shuffle(lines),
        lambda: lines.__setitem__(slice(at, None), []),
    ]
    draw.choice(changes)()
    return "\n".join(lines)


def _of_characters(draw: random.Random, text: str) -> str:
    at = draw.randrange(len(text) + 1)
    return (
        text[:at]
        + draw.choice((":", "'", '"', "{", "[", "&", "*", "!", "\n", "\t", "-", "\u0085", "\ufeff", "é"))
        + text[at + draw.randrange(3) :]
    )
