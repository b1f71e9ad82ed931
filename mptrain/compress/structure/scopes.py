"""`ignore` and `bits` patterns: one spelling, on the module names of the torch model.

A plain pattern is a run of whole name components: `encoder.layer.1` is in
`bert.encoder.layer.1.output.dense` but not in `bert.encoder.layer.10`. A pattern that starts
with `re:` is a regular expression searched anywhere in the name. A module that matches
takes everything below it along.

A pattern with a slash names single operations of a module: `gem/pow/1` is the second call of torch's `pow` in the
module `gem` itself, `gem/pow` all of them; the part before the slash is a run of whole components at the end of the
module's name. An expression with a slash is searched in such names. Functions are spelled without the underscores
around them (`add`, also of +), and counted from 0 over one forward pass.

Backends name operations in their own ways. OpenVINO uses the trace's scope
(`__module.bert.encoder.layer.3.attention.self.query/aten::linear/MatMul`). NNCF counts calls and
drops the index of a layer (`bert/encoder/attention/self/query/linear/3`): there `placement.py`
records which module each operation runs in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Sequence

from mptrain.core.errors import UserError

_OPENVINO_SCOPE = re.compile(r"__module\.([^/]+)/")


def matches(pattern: str, name: str) -> bool:
    """Whether `pattern` matches the module `name` or one of the modules around it."""
    if pattern.startswith("re:"):
        return re.search(pattern[3:], name) is not None
    return f".{pattern}." in f".{name}."


def resolve(patterns: Sequence[str], names: Iterable[str], field: str) -> set[str]:
    """The names that some pattern matches, with everything below them.

    Raises UserError, naming `field`, for a pattern that matches nothing or is no valid regular expression.
    """
    names = [n for n in names if n]
    found = _matched(patterns, names, matches, lambda pattern: f"module. {_hint(pattern, names)}", field)
    return {n for n in names if any(n == f or n.startswith(f + ".") for f in found)}


def is_operation(pattern: str) -> bool:
    return "/" in pattern


def resolve_operations(patterns: Sequence[str], scopes: Sequence[str], field: str) -> set[str]:
    """Of `scopes`, MODULE/FUNCTION/CALL each, those that some pattern matches.

    Raises UserError, naming `field`, for a pattern that matches nothing or is no valid regular expression.
    """
    return _matched(patterns, scopes, matches_operation, lambda p: f"operation. {_near(p, scopes)}", field)


def _matched(
    patterns: Sequence[str],
    names: Sequence[str],
    match: Callable[[str, str], bool],
    none: Callable[[str], str],
    field: str,
) -> set[str]:
    """The names that some pattern matches. none: what it says of a pattern that matches nothing. Raises UserError."""
    found: set[str] = set()
    for pattern in patterns:
        try:
            hits = {name for name in names if match(pattern, name)}
        except re.error as error:
            raise UserError(f"{field}: {pattern!r} is not a regular expression: {error}") from None
        if not hits:
            raise UserError(f"{field}: {pattern!r} matches no {none(pattern)}")
        found |= hits
    return found


def matches_operation(pattern: str, scope: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern[3:], scope) is not None
    module, function, call = scope.rsplit("/", 2)
    wanted, _, rest = pattern.partition("/")
    return f".{module}".endswith(f".{wanted}") and rest in (function, f"{function}/{call}")


def check_operations(patterns: Sequence[str], modules: Iterable[str], field: str) -> None:
    """What can be said of them before the model runs: the module of each must be there. Raises UserError."""
    modules = list(modules)
    for pattern in patterns:
        wanted = pattern.partition("/")[0]
        if not pattern.startswith("re:") and not any(f".{module}".endswith(f".{wanted}") for module in modules):
            raise UserError(f"{field}: {pattern!r}: no module is called {wanted!r}. {_hint(wanted, modules)}")


def _near(pattern: str, scopes: Sequence[str]) -> str:
    wanted = pattern.removeprefix("re:")
    module = wanted.partition("/")[0]
    inside = [scope for scope in scopes if f".{scope.partition('/')[0]}".endswith(f".{module}")]
    shorter = dict.fromkeys(scope if wanted.count("/") > 1 else scope.rpartition("/")[0] for scope in scopes)
    close = difflib.get_close_matches(wanted, list(shorter), n=4, cutoff=0.5)
    if inside:
        return f"{module} runs {', '.join(inside[:12])}{' and more' if len(inside) > 12 else ''}."
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"The model's operations are named like {', '.join(repr(s) for s in scopes[-3:])}."


def _hint(pattern: str, names: Sequence[str]) -> str:
    """Names close to the pattern, compared over as many components as the pattern has."""
    wanted = pattern.removeprefix("re:")
    width = wanted.count(".") + 1
    pieces: dict[str, None] = {}
    for name in names:
        parts = name.split(".")
        for start in range(max(1, len(parts) - width + 1)):
            pieces.setdefault(".".join(parts[start : start + width]), None)
    close = difflib.get_close_matches(wanted, list(pieces), n=4, cutoff=0.5)
    if close:
        return f"Did you mean {' or '.join(repr(c) for c in close)}?"
    return f"The model's modules are named like {', '.join(repr(n) for n in names[-3:])}."


def openvino_module(friendly_name: str) -> str | None:
    """Torch module name in the friendly name of an OpenVINO node, None if it has none.

    `__module.encoder.layer.3.output/aten::linear/MatMul` -> `encoder.layer.3.output`.
    """
    found = _OPENVINO_SCOPE.match(friendly_name)
    return found[1] if found else None
