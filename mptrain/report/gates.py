"""The recipe's gates, checked on the rows of the report.

A size or speed gate counts only variants whose own drop is inside `max_drop`: a small model
that lost its accuracy proves nothing. A value that is missing or not a number never passes.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mptrain.export.facts import Facts
from mptrain.recipe import Gates
from mptrain.recipe.exports import spec_of
from mptrain.report.row import Row

FLOATING = ("fp32", "fp16", "compressed")
"""precisions of variants whose activations are not quantized"""


def within(comparison: Row, max_drop: float | None) -> bool:
    """Whether the variant's drop is a number inside the limit (any number without a limit)."""
    drop = comparison["drop"]
    return drop is not None and (max_drop is None or drop <= max_drop)


def exact(variant: Row) -> bool:
    """Whether the parity gate judges it, and not the agreement gate."""
    if not (variant["parity"] or {}).get("numbers", True):  # choices alone, such as of an argmax, have no difference
        return False
    return Facts.from_json(variant["runtime"]).exact(variant["precision"])


def check(gates: Gates, variants: Sequence[Row], comparisons: Sequence[Row], layers: int | None) -> list[Row]:
    """Rows {name, value, limit, passed, variant} in the order of the recipe's fields; a size or speed gate that a
    variant outside `max_drop` alone would pass has {value, variant, drop} of that as not_counted.

    Args:
        variants, comparisons: rows of the report, numbers finite or None.
        layers: attention layers of the model, for variants whose runtime facts lack them.
    """
    rows: list[Row] = []
    counting = [c for c in comparisons if within(c, gates.max_drop)]
    others = [c for c in comparisons if c["drop"] is not None and c not in counting]
    if gates.max_drop is not None:
        rows.append(_smallest("max_drop", gates.max_drop, ((c["drop"], c["id"]) for c in comparisons)))
    if gates.min_size_ratio is not None:
        sizes, more = ([(c["size_ratio"], c) for c in group] for group in (counting, others))
        rows.append(_largest("min_size_ratio", gates.min_size_ratio, sizes, more))
    for setting, limit in gates.min_speedup.items():
        speeds, more = ([(c["speedup"].get(setting), c) for c in group] for group in (counting, others))
        rows.append(_largest(f"min_speedup.{setting}", limit, speeds, more))
    whole = [v for v in variants if exact(v)]
    if gates.parity is not None and whole:
        rows.append(_parity(gates.parity, whole))
    rounded = [v for v in variants if not exact(v)]
    if gates.agreement is not None and rounded:
        rows.append(_agreement(gates.agreement, rounded))
    written = [v for v in variants if v.get("generation")]
    if gates.cached_perplexity is not None and written:
        rows.append(_cached(gates.cached_perplexity, written))
    compiled = able(variants, "fused_attention")
    if gates.fused_attention is not None and compiled:
        rows.append(_fused(gates.fused_attention, compiled, layers))
    counted = able(variants, "max_casts")
    if gates.max_casts is not None and counted:
        rows.append(_casts(gates.max_casts, counted))
    computed = able(variants, "effective_precision")
    if gates.effective_precision == "i8":
        computed = [v for v in computed if not is_float(v)]
    if gates.effective_precision is not None and computed:
        rows.append(_computed(gates.effective_precision, computed))
    return rows


def able(variants: Iterable[Row], check: str) -> list[Row]:
    """The variants of formats whose facts answer a check."""
    return [v for v in variants if check in spec_of(v["format"]).checks]


def is_float(variant: Row) -> bool:
    """Whether its activations are not quantized, by its precision."""
    return variant["precision"] in FLOATING


def _smallest(name: str, limit: float, values: Iterable[tuple[float | None, str]]) -> Row:
    known = [(value, variant) for value, variant in values if value is not None]
    value, variant = min(known, default=(None, None))
    return _row(name, value, limit, value is not None and value <= limit, variant)


Valued = Sequence[tuple[float | None, Row]]


def _largest(name: str, limit: float, values: Valued, others: Valued) -> Row:
    """others: of variants that do not count; the one that would have passed is named."""
    known, more = (
        [(value, c["id"], c["drop"]) for value, c in group if value is not None] for group in (values, others)
    )
    value, variant, _ = max(known, default=(None, None, None))
    row = _row(name, value, limit, value is not None and value >= limit, variant)
    if more and not row["passed"] and (best := max(more))[0] >= limit:
        row["not_counted"] = dict(zip(("value", "variant", "drop"), best))
    return row


def missed(gate: Row) -> str:
    """For a person who reads the log."""
    text = f"gate {gate['name']} missed: {gate['value']} against a limit of {gate['limit']}"
    if other := gate.get("not_counted"):
        text += f" ({other['variant']} has {other['value']:.3g}, but its drop of {other['drop']:.3g} is above max_drop)"
    return text


def _parity(limit: float, variants: Sequence[Row]) -> Row:
    """The worst of all fp32 variants; one without a number is the worst."""
    found = [(v["parity"] or {}, v["id"]) for v in variants]  # reports of before have no relative difference
    values = [(parity.get("relative", parity.get("max_abs_diff")), name) for parity, name in found]
    value, variant = max(values, key=lambda pair: float("inf") if pair[0] is None else pair[0])
    return _row("parity", value, limit, value is not None and value <= limit, variant)


def _agreement(limit: float, variants: Sequence[Row]) -> Row:
    """The least of all quantized variants; one without a number is the least."""
    values = [((v["parity"] or {}).get("agreement"), v["id"]) for v in variants]
    value, variant = min(values, key=lambda pair: -1.0 if pair[0] is None else pair[0])
    return _row("agreement", value, limit, value is not None and value >= limit, variant)


def _cached(limit: float, variants: Sequence[Row]) -> Row:
    """The worst of all variants that wrote with a cache; one without a number is the worst."""
    values = [(v["generation"]["perplexity"]["relative"], v["id"]) for v in variants]
    value, variant = max(values, key=lambda pair: float("inf") if pair[0] is None else pair[0])
    return _row("cached_perplexity", value, limit, value is not None and value <= limit, variant)


def _fused(limit: str | int, variants: Sequence[Row], layers: int | None) -> Row:
    """The variant that misses its limit by most; "all" is its number of attention layers."""
    rows = []
    for v in variants:
        facts = Facts.from_json(v["runtime"])
        fused = facts.fused_attention
        known = layers if facts.attention_layers is None else facts.attention_layers
        wanted = limit if isinstance(limit, int) else known
        passed = fused is not None and wanted is not None and fused >= wanted
        short = float("inf") if fused is None or wanted is None else wanted - fused
        rows.append((short, _row("fused_attention", fused, wanted, passed, v["id"])))
    return max(rows, key=lambda pair: pair[0])[1]


def _casts(limit: int, variants: Sequence[Row]) -> Row:
    """The variant with the most; one of which they are not known has more."""
    values = [(v["runtime"].get("float_casts"), v["id"]) for v in variants]
    value, variant = max(values, key=lambda pair: float("inf") if pair[0] is None else pair[0])
    return _row("max_casts", value, limit, value is not None and value <= limit, variant)


def _computed(wanted: str, variants: Sequence[Row]) -> Row:
    """The variant with the least share of layers in that precision; layers in integers count for i8 alone."""
    values = [(_share(wanted, v["runtime"].get("layer_precisions")), v["id"]) for v in variants]
    value, variant = min(values, key=lambda pair: -1.0 if pair[0] is None else pair[0])
    return _row(f"effective_precision.{wanted}", value, 1.0, value == 1.0, variant)


def _share(wanted: str, types: Mapping[str, Mapping[str, int]] | None) -> float | None:
    """Of all types of layers the least: one type of few layers that falls back is not hidden by another of many."""
    if types is None:
        return None
    counts = [{k: n for k, n in found.items() if wanted == "i8" or k != "i8"} for found in types.values()]
    shares = [found.get(wanted, 0) / sum(found.values()) for found in counts if found]
    return min(shares, default=1.0 if wanted != "i8" else 0.0)


def _row(name: str, value: float | None, limit: float | None, passed: bool, variant: str | None) -> Row:
    return {"name": name, "value": value, "limit": limit, "passed": passed, "variant": variant}
