"""What `mptrain verify` found, in a terminal."""

from __future__ import annotations

from typing import Any, Literal

from rich.console import Group, RenderableType

from mptrain.report import words
from mptrain.report.render.terminal import draw, line
from mptrain.report.tables.results import Cell, Table

_SHOWN = 8
_HALF = 65504.0


def package(facts: dict[str, Any]) -> RenderableType:
    """Tables and verdict for `rich.print`."""
    stored = ", ".join(f"{words.megabytes(size)} {kind}" for kind, size in facts["weight_types"].items())
    parts: list[RenderableType] = [
        line("•", f"{facts['package']}: specification {facts['specification']}, weights {stored or 'none'}", "bold"),
        line("•", f"inputs {'; '.join(facts['inputs'])}; outputs {', '.join(facts['outputs'])}", ""),
        line("•", f"{facts['casts']} casts, {facts['float_casts']} between float16 and float32", ""),
        draw(_operations(facts)),
    ]
    if facts["fp32_operations"]:
        parts.append(line("•", f"in float32: {', '.join(facts['fp32_operations'])}", ""))
    found = facts["parity"]
    if found is not None:
        good = found["error"] <= found["limit"]
        text = (
            f"{'is' if good else 'is not'} the source model: largest difference {found['max_abs_diff']:.2g}, relative"
            f" error of a row {found['error']:.2g} (limit {found['limit']:g}), cosine {found['cosine']:.6f}"
        )
        parts.append(line("✓" if good else "✗", text, "green" if good else "bold red"))
        for name, words_of in found["model_reads"].items():
            parts.append(line("•", f"{name}: the source model was given {words_of}", ""))
        for odd in found["labels_differ"][:3]:
            text = f"class {odd['class']} is {odd['package']!r} in the package and {odd['model']!r} in the source model"
            parts.append(line("!", text, "yellow"))
    if not facts["outputs_finite"]:
        first = ", ".join(facts["not_finite"][:3])
        parts.append(line("✗", f"outputs with NaN or infinity; operations with such values: {first}", "bold red"))
    parts.append(line("!", facts["limits"], "yellow"))
    return Group(*parts)


def file(facts: dict[str, Any]) -> RenderableType:
    """Of a model that a runtime executed."""
    found, runtime = facts["parity"], facts["runtime"]
    stored = ", ".join(f"{words.megabytes(bytes_)} {kind}" for kind, bytes_ in runtime.get("weight_types", {}).items())
    parts: list[RenderableType] = [
        line("•", f"{facts['path']}: {words.megabytes(facts['size_bytes'])}, weights {stored or 'none'}", "bold")
    ]
    parts += [line("•", text, "") for text in _running(runtime)]
    if found is not None:
        text = (
            f"{'is' if facts['passed'] else 'is not'} the source model: largest difference {found['max_abs_diff']:.2g}"
            f" on {found['examples']} inputs ({facts['inputs']}), relative {found['relative']:.2g}, same decision in"
            f" {100 * found['agreement']:.1f}%; judged by {facts['judged_by']}, limit {facts['limit']:g}"
        )
        parts.append(line("✓" if facts["passed"] else "✗", text, "green" if facts["passed"] else "bold red"))
    else:
        parts.append(line("!", "not compared: --model SOURCE compares it with the model it was made from", "yellow"))
    return Group(*parts)


def found(facts: dict[str, Any]) -> Table:
    """Of a model that a runtime executed, the one row that decides."""
    compared, stored = facts["parity"], facts["runtime"].get("weight_types", {})
    row = [
        Cell(facts["path"]),
        Cell(words.megabytes(facts["size_bytes"])),
        Cell(", ".join(f"{words.megabytes(size)} {kind}" for kind, size in stored.items()) or "none"),
        Cell("–" if compared is None else f"{compared['relative']:.2g}"),
        Cell("–" if compared is None else f"{100 * compared['agreement']:.1f}%"),
    ]
    return Table("", ["Exported model", "Size", "Weights", "Relative difference", "Same decision"], [row])


def _running(runtime: dict[str, Any]) -> list[str]:
    """What the runtime made of it, in words, as far as it is known."""
    texts = []
    if "inference_precision" in runtime:
        texts.append(f"floating point runs in {runtime['inference_precision']}")
    if "attention_layers" in runtime:
        texts.append(
            f"attention: {runtime.get('fused_attention', 0)} of {runtime['attention_layers']} as one operation"
        )
    if names := runtime.get("fused_nodes"):
        shown = ", ".join(names[:_SHOWN])
        texts.append(f"fused: {shown}{f' and {len(names) - _SHOWN} more' if len(names) > _SHOWN else ''}")
    for kind, found in runtime.get("layer_precisions", {}).items():
        texts.append(f"{kind} computes in {', '.join(f'{name} ({count})' for name, count in found.items())}")
    if "int8_layers" in runtime:
        total = len(runtime["int8_layers"]) + len(runtime.get("fp32_layers", ()))
        texts.append(f"layers in integers: {len(runtime['int8_layers'])} of {total}")
    casts = [f"{runtime[key]} {text}" for key, text in _CASTS.items() if key in runtime]
    if casts:
        texts.append(", ".join(casts))
    if "cache" in runtime:
        texts.append(f"a key-value cache of {runtime['cache']:,} tokens")
    return texts


_CASTS = {
    "casts": "casts in the file",
    "float_casts": "between float and half",
    "converts": "conversions in the graph that runs",
}


def _operations(facts: dict[str, Any]) -> Table:
    rows = []
    for row in facts["operations_run"][:_SHOWN]:
        tone: Literal["", "warn", "bad"] = (
            "bad" if row["nan"] or row["infinite"] else "warn" if row["largest"] > _HALF else ""
        )
        values = max(row["values"], 1)
        rows.append(
            [
                Cell(row["name"]),
                Cell(row["type"]),
                Cell(f"{row['largest']:.4g}", tone=tone),
                Cell(str(row["nan"] + row["infinite"]), tone=tone),
                Cell(f"{100 * row['zeroed'] / values:.2g} %"),
            ]
        )
    count = len(facts["operations_run"])
    title = f"Operations with the largest values, {min(_SHOWN, count)} of {count} (arithmetic: {facts['precision']})"
    return Table(title, ["Operation", "Type", "Largest |x|", "Not finite", "Zero in float16"], rows, text_columns=1)
