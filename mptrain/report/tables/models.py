"""Tables of what the models are: structure, stored weights, precisions, and what the runtimes do with them."""

from __future__ import annotations

from mptrain.report import words
from mptrain.report.gates import exact
from mptrain.report.row import Row
from mptrain.report.tables.results import Cell, Table


def structure(report: Row) -> Table | None:
    """Heads, channels and parameters kept: layer by layer, or block by block where a layer has several of a kind."""
    facts = report["structure"] or {}
    layers, blocks = facts.get("layers"), facts.get("blocks", [])
    if not layers:
        return None
    note = f"Stage {facts['stage']}, family {facts['family']}. Removed physically: the exported model is dense."
    gone = [block["name"] for block in blocks if not block["kept"]]
    if gone:
        note += f" Left out whole, a constant stands for each: {', '.join(words.fold(gone))}."
    several = len({(block["layer"], block["kind"] == "heads") for block in blocks}) < len(blocks)
    if several:
        return Table("Structure kept", ["Block", "Kind", "Units", "Parameters"], _blocks(blocks), note, text_columns=2)
    rows = []
    for layer in layers:
        heads, ffn = count(layer["heads"]), count(layer["ffn"])
        which = ", ".join(map(str, layer["heads"])) if isinstance(layer["heads"], list) else ""
        rows.append(
            [
                Cell(str(layer["layer"])),
                Cell(f"{heads} of {layer['heads_total']}", which and f"heads {which}"),
                Cell(
                    f"{ffn:,} of {layer['ffn_total']:,}", bar=ffn / layer["ffn_total"] if layer["ffn_total"] else None
                ),
                Cell(f"{layer['params']:,}", _share(layer["params"], layer["params_total"])),
            ]
        )
    total = {key: sum(count(layer[key]) for layer in layers) for key in ("heads", "ffn", "params")}
    of = {key: sum(layer[f"{key}_total"] for layer in layers) for key in ("heads", "ffn", "params")}
    rows.append(
        [
            Cell("all layers"),
            *(Cell(f"{total[key]:,} of {of[key]:,}", _share(total[key], of[key])) for key in ("heads", "ffn")),
            Cell(f"{total['params']:,}", _share(total["params"], of["params"])),
        ]
    )
    return Table("Structure kept", ["Layer", "Heads", "FFN channels", "Parameters"], rows, note)


def _blocks(blocks: list[Row]) -> list[list[Cell]]:
    rows = [
        [
            Cell(block["name"]),
            Cell(block["kind"]),
            Cell(f"{block['kept']:,} of {block['total']:,}", bar=block["kept"] / block["total"]),
            Cell(f"{block['params']:,}", _share(block["params"], block["params_total"])),
        ]
        for block in blocks
    ]
    left, whole = (sum(block[key] for block in blocks) for key in ("params", "params_total"))
    return [*rows, [Cell("all blocks"), Cell(""), Cell(""), Cell(f"{left:,}", _share(left, whole))]]


def runtime(report: Row) -> Table | None:
    """What the compiled models really do: fused attention, precisions, stored weight types, parity."""
    known = [v for v in report["variants"] if v["runtime"] or v["parity"]]
    if not known:
        return None
    rows = []
    for v in known:
        facts, parity = v["runtime"], v["parity"] or {}
        fused, layers = facts.get("fused_attention"), facts.get("attention_layers")
        stored = ", ".join(f"{kind} {words.megabytes(size)}" for kind, size in facts.get("weight_types", {}).items())
        agreement = parity.get("agreement")
        rows.append(
            [
                Cell(v["id"]),
                Cell(stored or words.NONE),
                Cell(str(facts.get("inference_precision", words.NONE))),
                Cell(words.NONE if fused is None else f"{fused} of {layers}" if layers else f"{fused}"),
                *(Cell(f"{len(facts[key])}" if key in facts else words.NONE) for key in ("int8_layers", "fp32_layers")),
                Cell(words.small(parity.get("max_abs_diff"))),
                Cell(words.NONE if agreement is None else f"{100 * agreement:.1f}%"),
            ]
        )
    columns = ["Variant", "Weights stored", "Compute", "Fused attention", "int8 layers", "fp32 layers"]
    columns += ["Max |difference|", "Same answer"]
    note = (
        "Read from the compiled models. Difference and agreement: exported model against the torch model it came from."
    )
    for execution in dict.fromkeys(v["runtime"]["execution"] for v in known if "execution" in v["runtime"]):
        ids = ", ".join(v["id"] for v in known if v["runtime"].get("execution") == execution)
        note += f" {ids}: scored by {execution}, and not timed."
    for v in known:
        if cache := v["runtime"].get("cache"):
            kept = v["runtime"]["cache_precision"]
            fed = v["runtime"].get("cache_fed", "texts went in piece by piece")  # before it was a fact
            note += f" {v['id']}: keeps a key-value cache of {cache:,} tokens in {kept}; {fed}"
            note += ", and agreement judges it." if v["precision"] == "fp32" and not exact(v) else "."
    return Table("Runtime", columns, rows, note, text_columns=2)


def half(report: Row) -> Table | None:
    """What fp16 exports keep in fp32, so that nothing overflows."""
    found = [(v["id"], v["runtime"]["half"]) for v in report["variants"] if "kept" in v["runtime"].get("half", {})]
    if not found:
        return None
    rows = []
    for name, facts in found:
        kept, constants, executed = list(facts["kept_fp32"]), facts.get("constants", []), facts.get("executed")
        rows.append(
            [
                Cell(name),
                Cell(
                    ", ".join(words.fold(kept)) or "none",
                    f"{len(kept)} operation{'s' * (len(kept) != 1)}" if kept else "",
                ),
                Cell(", ".join(words.fold(constants)) or "none"),
                Cell(str(facts.get("float_casts", facts.get("casts", words.NONE)))),
                Cell(f"{facts['kept']['cosine']:.6f}"),
                Cell(words.small(executed["max_diff"]) if executed else words.NONE),
            ]
        )
    columns = [
        "Variant",
        "Operations",
        "Constants",
        "Float↔half casts",
        "Cosine, emulated",
        "Max |difference|, executed",
    ]
    note = (
        "The smallest set that a search on calibration inputs found (for what this run trained, among them the training"
        " examples that reached the largest activations): operations that overflow or underflow fp16 and change the"
        " outputs. Cosine: outputs against fp32, every other operation rounded to fp16. Executed: in fp16 on this host,"
        " where it can."
    ) + "".join(f" {name}: {facts['note']}." for name, facts in found if facts.get("note"))
    return Table("Kept in fp32", columns, rows, note, text_columns=2)


def compressed(report: Row) -> Table | None:
    """Weights stored as integers or table entries, those that are alike in one row."""
    rows = []
    for stage, weights in report.get("compressed", {}).items():
        alike: dict[tuple[str, float], list[Row]] = {}
        for weight in weights:
            alike.setdefault((weight["how"], weight["bits"]), []).append(weight)
        for (how, bits), group in alike.items():
            rows.append(_stored([Cell(stage), Cell(f"{bits:g} bits", how)], group))
        rows.append(_stored([Cell(stage), Cell("all")], weights))
    columns = ["Stage", "Stored as", "Weights", "Size", "Against fp16", "Layers"]
    note = (
        "Integers and indices packed to their bits, with their scales and tables: what a target that has them stores."
    )
    note += _left(report)
    return Table("Compressed weights", columns, rows, note, text_columns=1) if rows else None


def _left(report: Row) -> str:
    """What the methods of each stage left in floating point, as shares of all parameters."""
    said = ""
    for stage, about in (report.get("methods") or {}).items():
        for found in about["facts"].values():
            if coverage := found.get("coverage"):
                kinds = list(coverage["left"].items())[:4]
                left = ", ".join(f"{what} {100 * share:.1f}%" for what, share in kinds if share >= 0.0005)
                said += f" {stage}: {100 * coverage['covered']:.1f}% of the parameters"
                said += f"; left in floating point: {left}." if left else "."
    return said


def _stored(first: list[Cell], weights: list[Row]) -> list[Cell]:
    count, size = (sum(w[key] for w in weights) for key in ("count", "bytes"))
    names = words.fold([w["weight"].removesuffix(".weight") for w in weights])
    layers = Cell(f"{len(weights)}", ", ".join(names) if len(first[1].sub) and len(names) <= 4 else "")
    return [
        *first,
        Cell(f"{count / 1e6:.2f} M"),
        Cell(words.megabytes(size)),
        Cell(words.ratio(2 * count / size)),
        layers,
    ]


def restored(report: Row) -> Table | None:
    """Layers that a search left in float, so that quantization costs no more than a limit."""
    rows, said = [], ""
    for stage, about in (report.get("methods") or {}).items():
        for found in filter(None, (facts.get("restored") for facts in about["facts"].values())):
            unit = found["unit"]
            rows.append(
                [
                    Cell(stage),
                    Cell(", ".join(found["ignore"]) or "none", f"of {found['units']} units" if found["ignore"] else ""),
                    Cell(words.metric(unit, found["float"])),
                    Cell(words.metric(unit, found["int8"])),
                    Cell(words.metric(unit, found["found"])),
                    Cell(words.drop(unit, found["drop"]), f"≤ {words.drop(unit, found['limit'])}"),
                    Cell(f"{found['evaluations']}"),
                ]
            )
            said = f"{found['metric']} of the torch models on {found['n']:,} validation examples"
    columns = ["Stage", "Left in float", "Float", "All int8", "With these in float", "Drop", "Scores"]
    note = (
        f"Found by `quantize.ignore: auto`: {said}, which chose them, so that the test split alone says what they are"
        " worth. Written as `ignore`, the names give the same model."
    )
    return Table("Layers found to need float", columns, rows, note, text_columns=1) if rows else None


def layer_lists(report: Row) -> list[tuple[str, list[str]]]:
    """[("int8 in jpqd_int8 (36)", names)] with numbered layers folded: "encoder.layer.{0-5}.output"."""
    groups: dict[tuple[str, tuple[str, ...]], list[str]] = {}
    for v in report["variants"]:
        for kind in ("int8", "fp32"):
            names = v["runtime"].get(f"{kind}_layers")
            if names:
                groups.setdefault((kind, tuple(names)), []).append(v["id"])
        for scope, nodes in v["runtime"].get("left_in_float", {}).items():  # ignored, in the names of the file
            groups.setdefault((f"{scope} in float", tuple(nodes)), []).append(v["id"])
    return [
        (f"{kind} in {', '.join(variants)} ({len(names)})", words.fold(list(names)) or ["no node of its own"])
        for (kind, names), variants in groups.items()
    ]


def count(kept: int | list[int]) -> int:
    """Structure rows give what is kept as a number or as the list of its indices."""
    return kept if isinstance(kept, int) else len(kept)


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.0f}%" if whole else ""
