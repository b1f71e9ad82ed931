"""What each export target makes of each compression, as a table: asked of the specs, which tests hold to the files."""

from __future__ import annotations

from mptrain.recipe.exports import EXPORTS
from mptrain.recipe.exports.base import ExportSpec
from mptrain.recipe.method import Weights

COMPRESSIONS = {
    "int8 of JPQD, QAT and PTQ": Weights("integers", 8, activations=True),
    "int4 of QAT and PTQ": Weights("integers", 4, activations=True),
    "int8 weights, a scale to the tensor or row": Weights("integers", 8, "row"),
    "int4 weights, a scale to the block": Weights("integers", 4, "block"),
    "the same of convolutions (convolutions: same)": Weights("integers", 4, "block", kernels=True),
    "look-up tables, one to the tensor": Weights("tables", 4, "tensor"),
    "look-up tables to groups of rows, or of vectors": Weights("tables", 4, "group", vectors=True),
    "look-up tables with a scale to each row": Weights("tables", 4, "group", row_scale=True),
}


def rows() -> list[tuple[str, str, str, str]]:
    """(target, compressions, result, how), of compressions that a target stores alike one row."""
    found: list[tuple[str, str, str, str]] = []
    for kind in EXPORTS.values():
        for target, export in _entry(kind).targets():
            alike: dict[tuple[str, str], list[str]] = {}
            for name, weights in COMPRESSIONS.items():
                stored = export.stores(weights)
                alike.setdefault((stored.result, stored.how), []).append(name)
            found += [
                (target, "any" if len(names) == len(COMPRESSIONS) else "; ".join(names), result, how)
                for (result, how), names in alike.items()
            ]
    return found


def _entry(kind: type[ExportSpec]) -> ExportSpec:
    return kind.model_validate({"id": "any", "format": kind.name(), "of": ["model"]})


def markdown() -> str:
    """The table as a section of docs/recipes.md."""
    lines = ["| Target | Compression | Result | How |", "|---|---|---|---|"]
    lines += [f"| {' | '.join(row)} |" for row in rows()]
    said = (
        "stored: the very integers, scales or tables of the torch model. expanded: the values are exact, the size is"
        " not. refused: an error before training says why."
    )
    return "## What each target stores\n\n" + said + "\n\n" + "\n".join(lines) + "\n"
