"""What a reader must know before believing the numbers: a baseline that learned nothing, gates without a variant."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mptrain.data.sources import packaged
from mptrain.recipe import EXPORTS, Recipe, plan
from mptrain.report import gates
from mptrain.report.row import Row

_CHECKS = {
    "fused_attention": "fused-attention",
    "max_casts": "casts",
    "effective_precision": "effective-precision",
}
"""gates that only some formats' facts can answer, with what they are called in a note"""


def notes(
    recipe: Recipe,
    variants: Sequence[Row],
    baseline: str | None,
    data_facts: Mapping[str, Any],
    methods: Mapping[str, Mapping[str, Row]],
) -> list[str]:
    """variants: rows of the report. data_facts: of the task's data. methods: facts, by stage and its field."""
    return [
        *_unlearned(variants, baseline or "", data_facts),
        *_unchecked(recipe, variants),
        *_expanded(recipe, variants),
        *_saturating(recipe, variants),
        *_cut(recipe, methods),
        *_adapted(methods),
        *filter(None, [packaged.note(recipe.model.path), packaged.note(recipe.data.source or "")]),
        *_unscored(variants),
    ]


def _unlearned(variants: Sequence[Row], baseline: str, data_facts: Mapping[str, Any]) -> list[str]:
    """A baseline that is no better than its commonest answer: what is near it says nothing."""
    counts = data_facts.get("labels", {}).get("test", {})
    accuracy = next((v["metrics"].get("accuracy") for v in variants if v["id"] == baseline), None)
    if not counts or accuracy is None or accuracy["value"] is None:
        return []
    label, count = max(counts.items(), key=lambda item: item[1])
    share = count / sum(counts.values())
    if accuracy["value"] > share:
        return []
    return [
        f"{baseline} is right on {100 * accuracy['value']:.1f}% of the test split, and whoever always answers {label!r}"
        f" on {100 * share:.1f}%: it has learned nothing, so nothing follows from the differences to it."
    ]


def _unchecked(recipe: Recipe, variants: Sequence[Row]) -> list[str]:
    """Gates that had nothing to check."""
    notes = []
    if recipe.gates.parity is not None and not any(map(gates.exact, variants)):
        notes.append("The parity gate was not checked: no fp32 variant was exported (an fp16 cache does not count).")
    for check, words in _CHECKS.items():
        if getattr(recipe.gates, check) is not None and not gates.able(variants, check):
            able = " or ".join(spec.title for spec in EXPORTS.values() if check in spec.checks)
            notes.append(f"The {words} gate was not checked: no {able} variant was exported.")
    quantized = [v for v in gates.able(variants, "effective_precision") if not gates.is_float(v)]
    if recipe.gates.effective_precision == "i8" and not quantized and gates.able(variants, "effective_precision"):
        notes.append("The effective-precision gate was not checked: i8 is of quantized variants, and there is none.")
    return notes


def _expanded(recipe: Recipe, variants: Sequence[Row]) -> list[str]:
    """Variants whose format has no place for the tables of a stage."""
    exports = {planned.id: planned.export for planned in plan.variants(recipe)}
    found: dict[str, list[str]] = {}
    for v in variants:
        export, stage = exports.get(v["id"]), recipe.stage(v["stage"])
        tables = any(weights.kind == "tables" for _, weights in stage.leaves())
        if tables and export is not None and export.expands(stage):
            found.setdefault(export.title, []).append(v["id"])
    return [
        f"{title} has no look-up tables: the palettized weights of {', '.join(ids)} are written out as fp32 numbers."
        " They score as the tables do, but the file is not smaller; the table Compressed weights has the stored size."
        for title, ids in found.items()
    ]


def _saturating(recipe: Recipe, variants: Sequence[Row]) -> list[str]:
    """Variants whose int8 products exceed what some CPUs add them in."""
    ids = [
        v["id"]
        for v in variants
        if not gates.is_float(v) and any(weights.saturates for _, weights in recipe.stage(v["stage"]).leaves())
    ]
    if not ids:
        return []
    return [
        f"{', '.join(ids)}: x86 CPUs without VNNI or AMX add two products of int8 numbers in 16 bits, which these"
        " weights can exceed: outputs there differ from those on other CPUs. For such CPUs train with"
        " quantize.reduce_range: true, and measure on one of them."
    ]


def _cut(recipe: Recipe, methods: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """Stages that cut the vocabulary."""
    loss = " The loss is to a token of what is written, so those before and after are of other tokens: compare others"
    loss = f"{loss} of its scores." if recipe.model.kind.writes else ""
    return [
        f"{stage}: {facts['kept']:,} of {facts['of']:,} tokens stay; {100 * facts['changed']:.1f}% of the test inputs"
        f" are spelled with others than before.{loss}{_product(facts)}"
        for stage, found in methods.items()
        if (facts := found.get("vocabulary")) is not None
    ]


def _product(facts: Row) -> str:
    """Of the embedding of tokens that are kept, where it was asked to be one; with a space before it."""
    if "rank" not in facts:
        return ""
    if facts["explained"] is None:
        return f" Their embedding has no more than {facts['rank']} numbers to a token, so it stays as it is."
    held = f"{100 * facts['explained']:.1f}%"
    return (
        f" Their embedding is a product of rank {facts['rank']}, which held {held} of what its rows differ by before"
        " training."
    )


def _adapted(methods: Mapping[str, Mapping[str, Row]]) -> list[str]:
    """Stages that trained adapters."""
    found = [(stage, facts) for stage, done in methods.items() if (facts := done.get("adapters")) is not None]
    return [
        f"{stage}: {100 * facts['trained'] / facts['parameters']:.2g}% as many parameters as the model has were"
        f" trained, in adapters of {facts['layers']} layers, and are merged. "
        + (
            f"Rounding the weights after that moved them by {100 * facts['rounded']:.0f}% of the way that they were"
            " trained."
            if facts["rounded"] is not None
            else "The weights were not rounded after that."
        )
        for stage, facts in found
    ]


def _unscored(variants: Sequence[Row]) -> list[str]:
    """Variants whose heads do not keep what scores are made of, or whose outputs are not finite."""
    broken = [f"{v['id']} is not scored, and cannot be used. {v['unscored']}" for v in variants if v.get("unscored")]
    return broken + [
        f"{v['id']} is not scored: of its heads ({', '.join(v['runtime']['heads'])}) no score can be made. It was"
        " compared with the torch model with the same heads, and that model is scored in the export without heads."
        for v in variants
        if not v["metrics"] and v["runtime"].get("heads")
    ]
