"""What `mptrain.compress` did to a model, as tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.console import Group, RenderableType

from mptrain.report import words
from mptrain.report.render.terminal import draw
from mptrain.report.row import Row
from mptrain.report.tables import models
from mptrain.report.tables.results import Cell, Table


def compressed(
    name: str,
    parameters: tuple[int, int],
    did: Sequence[str],
    facts: dict[str, dict[str, Any]],
    history: Sequence[Row],
) -> RenderableType:
    """name: of the model's class. parameters: before and after. did: in words. facts: of methods, by stage and field.
    history: of the training."""
    before, after = parameters
    kept = Cell(words.millions(after), f"of {words.millions(before)}" if after != before else "all of them")
    rows = [[Cell(name if not number else ""), Cell(text), kept if not number else Cell("")]
            for number, text in enumerate(did or ["fine-tuning"])]  # fmt: skip
    parts: list[RenderableType] = [draw(Table("", ["Model", "Did", "Parameters"], rows, text_columns=1))]
    for methods in facts.values():
        for found in methods.values():
            if "structure" in found:
                parts.append(draw(_structure(found["structure"]["blocks"])))
    leaves = {stage: [row for found in methods.values() for row in found.get("compressed", ())]
            for stage, methods in facts.items()}  # fmt: skip
    stored = models.compressed({"compressed": {stage: found for stage, found in leaves.items() if found}})
    if stored is not None:
        parts.append(draw(stored))
    if table := _training(history):
        parts.append(draw(table))
    return Group(*parts)


def _structure(blocks: Sequence[Row]) -> Table:
    """Blocks that lost as much, in one row."""
    alike: dict[tuple[Any, ...], list[str]] = {}
    for block in blocks:
        key = tuple(block[name] for name in ("kind", "kept", "total", "params", "params_total"))
        alike.setdefault(key, []).append(block["name"])
    rows = [
        [
            Cell(name),
            Cell(kind),
            Cell(f"{kept:,} of {total:,}"),
            Cell(f"{params:,}", f"{100 * params / of:.0f}%" if of else ""),
        ]
        for (kind, kept, total, params, of), names in alike.items()
        for name in words.fold(names)
    ]
    return Table("Structure kept", ["Block", "Kind", "Units", "Parameters"], rows, text_columns=1)


def _training(history: Sequence[Row]) -> Table | None:
    """The first and last loss of each phase, and the last evaluation."""
    rows = []
    for key in dict.fromkeys((row["stage"], row["phase"]) for row in history):
        of_phase = [row for row in history if (row["stage"], row["phase"]) == key]
        losses = [row["loss"] for row in of_phase if "loss" in row]
        scores = [row for row in of_phase if "eval_loss" in row]
        rows.append(
            [
                Cell(" ".join(key)),
                Cell(f"{of_phase[-1]['step']:,}"),
                Cell(f"{losses[0]:.4g} → {losses[-1]:.4g}" if losses else words.NONE),
                Cell(f"{scores[-1]['eval_loss']:.4g}" if scores else words.NONE),
            ]
        )
    return Table("Training", ["Phase", "To step", "Loss", "Evaluation"], rows) if rows else None
