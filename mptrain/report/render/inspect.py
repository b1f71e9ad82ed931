"""What `mptrain inspect` found, in a terminal."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.text import Text

from mptrain.report import words
from mptrain.report.render.terminal import draw, line
from mptrain.report.tables.results import Cell, Table
from mptrain.report.words import fold
from mptrain.verify.overflow import MIN_UNDERFLOW
from mptrain.verify.ranges import HALF_MAX

_SHOWN = 8
_TONES = {"good": ("✓", "green"), "warn": ("!", "yellow"), "bad": ("✗", "bold red")}


def inspection(facts: dict[str, Any]) -> RenderableType:
    """Tables and verdict for `rich.print`."""
    attention = f"{facts['attn']} attention, " if facts["attn"] else ""
    head = (
        f"{facts['class']}, {facts['task']}, {attention}{words.millions(facts['parameters'])} parameters;"
        f" {facts['inputs']['examples']} inputs ({facts['inputs']['source']})"
    )
    parts: list[RenderableType] = [line("•", head, "bold"), *structure(facts["structure"])]
    parts.append(draw(memory("Memory", facts["memory"])))
    if "sharded" in facts:
        each = facts["sharded"]
        parts.append(draw(memory(f"Memory of each of {each['processes']} processes under FSDP2", each["memory"])))
    if facts["export"] is not None:
        parts.append(draw(ranges(facts["export"])))
        if facts["export"]["keep"]:
            parts.append(draw(kept(facts["export"])))
    if facts["speed"]["rows"]:
        parts.append(draw(speed(facts["speed"])))
    for item in facts["advice"]:
        mark, style = _TONES[item["tone"]]
        parts.append(line(mark, item["text"], style))
    patterns = (facts["training"].get("fp16") or {}).get("keep_fp32")
    if patterns:
        parts.append(line("→", "In a recipe:", "bold"))
        lines = ["precision:", "  compute: fp16", "  keep_fp32:", *(f"    - '{pattern}'" for pattern in patterns)]
        parts.append(Text("\n".join(lines), no_wrap=True, overflow="ignore"))  # to be copied as it is
    return Group(*parts)


def structure(found: dict[str, Any]) -> list[RenderableType]:
    """Blocks that can be cut, alike ones of numbered layers in one row; what cannot, with the reason; what is gone."""
    gone = fold(found.get("dropped", []))  # not in facts of before
    text = f"Left out whole by an earlier pruning: {', '.join(gone)}"
    said: list[RenderableType] = [line("–", text, "dim")] if gone else []
    if found["error"] is not None:
        return [*said, line("!", found["error"], "yellow")]
    alike: dict[tuple[Any, ...], list[str]] = {}
    for block in found["blocks"]:
        roles = (_owners(block, "source"), _owners(block, "sink"), _owners(block, "side"))
        layers = {axis["parameter"].rpartition(".")[0] for axis in block["axes"]}
        others = [edit["attribute"] for edit in block["edits"] if edit["module"] not in layers]
        fields = tuple(dict.fromkeys(others))
        key = (block["kind"], block["units"], block["heads"], block["unit_params"], roles, fields)
        alike.setdefault(key, []).append(block["name"])
    rows = []
    for (kind, units, heads, size, (made, read, along), fields), names in alike.items():
        grouped = f"{heads} query heads each" if heads > 1 else ""
        cut = f"{made} → {read}{f'; {along}' if along else ''}"
        cells = [Cell(f"{units:,} {kind}", grouped), Cell(cut), Cell(", ".join(fields) or "–"), Cell(f"{size:,}")]
        rows += [[Cell(name), *cells] for name in fold(names)]
    columns = ["Block", "Units", "Made by → read by; along", "Integers that fall", "Parameters of one"]
    parts: list[RenderableType] = [
        draw(
            Table(
                "What can be cut",
                columns,
                rows,
                "Each proved: cut by half, the model computes what it computes with the units masked.",
                text_columns=4,
            )
        )
    ]
    whys: dict[str, list[str]] = {}
    for one in found["refused"]:
        whys.setdefault(one["reason"], []).append(one["what"])
    left = [[Cell(what), Cell(reason)] for reason, names in whys.items() for what in fold(names)]
    parts += said
    return [*parts, draw(Table("What stays whole", ["What", "Because"], left, text_columns=2))] if left else parts


def _owners(block: dict[str, Any], role: str) -> str:
    """The last names of the modules, and of parameters that are not a weight or bias."""
    found = []
    for axis in block["axes"]:
        *path, last = axis["parameter"].split(".")
        if axis["role"] == role and not (role == "side" and last == "bias"):
            found.append(path[-1] if last in ("weight", "bias") and path else last)
    return ", ".join(dict.fromkeys(found))


def memory(title: str, predicted: list[dict[str, Any]]) -> Table:
    names = ("weights", "masters", "remainders", "gradients", "moments")
    rows = [
        [
            Cell(
                row["precision"],
                f"{words.millions(row['kept_fp32'])} in fp32" if 0 < row["kept_fp32"] < row["parameters"] else "",
            ),
            *(Cell(words.megabytes(row[name]) if row[name] else "–") for name in names),
            Cell(words.megabytes(row["total"])),
            Cell(f"{row['per_parameter']:.1f}"),
        ]
        for row in predicted
    ]
    columns = ["Training with AdamW", *(n.capitalize() for n in names), "Sum", "Bytes/parameter"]
    return Table(title, columns, rows)


def ranges(export: dict[str, Any]) -> Table:
    """The operations closest to what fp16 holds, and those that lose most values to 0."""
    risky = sorted(export["ranges"], key=lambda r: -r["largest"])[:_SHOWN]
    lost = sorted((r for r in export["ranges"] if r["zero"] > MIN_UNDERFLOW), key=lambda r: -r["zero"])[: _SHOWN // 2]
    rows = [
        [
            Cell(r["op"]),
            Cell(f"{r['largest']:.3g}", tone="bad" if r["largest"] > HALF_MAX else ""),
            Cell(_percent(r["overflow"])),
            Cell(_percent(r["zero"])),
            Cell(_percent(r["subnormal"])),
        ]
        for r in [*risky, *(r for r in lost if r not in risky)]
    ]
    return Table(
        f"Ranges of {export['ops']} operations in fp32",
        ["Operation", "Largest |x|", "Above 65504", "To 0", "Below 6.1e-5"],
        rows,
    )


def kept(export: dict[str, Any]) -> Table:
    rows = [[Cell(op), Cell(export["reasons"][op])] for op in export["keep"]]
    note = export.get("note") or ""
    return Table("In fp32 in an fp16 export", ["Operation", "Because"], rows, note.capitalize(), text_columns=1)


def speed(found: dict[str, Any]) -> Table:
    rows = [
        [
            Cell(row["what"]),
            Cell(row["compute"]),
            Cell(words.milliseconds(row["fp32_ms"]) + " ms"),
            Cell(words.milliseconds(row["half_ms"]) + " ms"),
            Cell(words.ratio(row["ratio"]), tone="good" if row["pays"] else "warn"),
        ]
        for row in found["rows"]
    ]
    title = f"Speed on {found['device']}, {found['threads']} thread{'s' * (found['threads'] > 1)}"
    return Table(title, ["What", "Compute", "fp32", "Half", "Times as fast"], rows, text_columns=1)


def _percent(fraction: float) -> str:
    return "–" if fraction == 0 else "<0.1%" if fraction < 1e-3 else f"{100 * fraction:.1f}%"
