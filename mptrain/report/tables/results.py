"""The tables of a report as plain data: Markdown, HTML and the terminal lay out the same ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any, Literal

from mptrain.report import claims, words
from mptrain.report.row import Row


@dataclass(frozen=True)
class Cell:
    """Text with a second, quieter one; `best` makes it bold; `bar` in 0..1 is drawn where there is room."""

    text: str
    sub: str = ""
    tone: Literal["", "good", "warn", "bad", "quiet"] = ""
    bar: float | None = None
    best: bool = False


@dataclass(frozen=True)
class Table:
    """The first column names the row, `text_columns` further ones hold words, the rest numbers."""

    title: str
    columns: list[str]
    rows: list[list[Cell]]
    note: str = ""
    text_columns: int = 0


def results(report: Row) -> Table | None:
    """One row per variant: every metric, difference to the baseline, size, parameters, speed."""
    if not report["variants"]:
        return None
    key = claims.setting(report)
    names = list(dict.fromkeys(name for v in report["variants"] for name in v["metrics"]))
    comparisons = {c["id"]: c for c in report["comparisons"]}
    largest = max(v["size_bytes"] for v in report["variants"])
    slowest = max((v["latency_ms"][key]["median"] for v in report["variants"] if key in v["latency_ms"]), default=1)
    columns = ["Variant", *(words.heading(name) for name in names), "Difference", "Size", "Parameters"]
    rows = []
    for v in report["variants"]:
        c = comparisons.get(v["id"])
        cells = [Cell(v["id"], _role(report, v)), *(score(v["metrics"].get(name)) for name in names)]
        reference = "baseline" if v["id"] == report["baseline"] else "not scored"
        cells.append(_difference(c) if c else Cell(reference, tone="quiet"))
        cells.append(
            Cell(
                words.megabytes(v["size_bytes"]),
                words.smaller(c["size_ratio"]) if c else "",
                bar=v["size_bytes"] / largest,
            )
        )
        kept = f"{100 / c['params_ratio']:.0f}% kept" if c else ""
        cells.append(Cell(words.millions(v["params"]), kept))
        if key:
            time = v["latency_ms"].get(key)
            if time:
                speed = words.ratio(c["speedup"].get(key)) + " as fast" if c else ""
                cells.append(Cell(f"{words.milliseconds(time['median'])} ms", speed, bar=time["median"] / slowest))
            else:
                cells.append(Cell("not timed", tone="quiet"))
        rows.append(cells)
    if report["floor"]:
        scores = [score(report["floor"]["metrics"].get(name)) for name in names]
        empty = [Cell("–", tone="quiet")] * (len(columns) - len(names) - 1 + bool(key))
        rows.append([Cell(report["floor"]["name"], "floor"), *scores, *empty])
    note = (
        "Beside each score its 95% interval, beside the difference its paired 95% interval and what that means, beside"
        " the rest the ratio to the baseline."
    )
    if key:
        columns.append("Latency")
        note += f" Latency at {words.setting_words(key, report['about_task']['unit'])}."
    examples = {m["n"] for v in report["variants"] for m in v["metrics"].values() if m["n"]}
    windows = report["data"].get("perplexity")
    scored = "windows" if windows else "examples"
    note += f" Scored on {' / '.join(f'{n:,}' for n in sorted(examples))} test {scored}, treated as independent."
    if windows:
        length, stride = windows["window"], windows["stride"]
        drawn = "of the windows drawn, " if report["recipe"]["data"]["max_samples"] else ""
        note += (
            f" Loss and perplexity: windows of {length:,} tokens, stride {stride:,}; {drawn}every token but the very"
            f" first is predicted once, after the first window from at least {length - stride:,} tokens before it."
        )
    return Table("Results", columns, rows, note)


def latency(report: Row) -> Table | None:
    """Median milliseconds, one row per setting, one column per variant."""
    timed = [v for v in report["variants"] if v["latency_ms"]]
    if not timed:
        return None
    speed = {c["id"]: c["speedup"] for c in report["comparisons"]}
    best = {key: row["id"] for key, row in ((report["recommendation"] or {}).get("by_setting") or {}).items()}
    rows = []
    for key in dict.fromkeys(key for v in timed for key in v["latency_ms"]):
        cells = [Cell(words.setting_words(key, report["about_task"]["unit"]))]
        for v in timed:
            time = v["latency_ms"].get(key)
            ratio = speed.get(v["id"], {}).get(key)
            median = words.milliseconds(time["median"]) if time else words.NONE
            cells.append(Cell(median, words.ratio(ratio) if ratio else "", best=best.get(key) == v["id"]))
        rows.append(cells)
    runs = sorted({time["runs"] for v in timed for time in v["latency_ms"].values()})
    rounds = f"{runs[0]}" if len(runs) == 1 else f"{runs[0]} to {runs[-1]}"
    note = (
        f"Milliseconds of one call, median of {rounds} alternating rounds, with the speed against {report['baseline']}."
        " Bold: the fastest variant inside the accuracy limit."
    )
    return Table("Latency", ["Setting", *(v["id"] for v in timed)], rows, note)


def throughput(report: Row) -> Table | None:
    """Examples a second with several requests in flight, one row per setting, one column per variant."""
    timed = [v for v in report["variants"] if v.get("throughput")]  # reports of before have none
    if not timed:
        return None
    base: Row = next((v["throughput"] for v in timed if v["id"] == report["baseline"]), {})
    rows = []
    for key in dict.fromkeys(key for v in timed for key in v["throughput"]):
        found = {v["id"]: v["throughput"][key]["median"] for v in timed if key in v["throughput"]}
        best = max(found, key=lambda name: found[name])
        cells = [Cell(words.setting_words(key, report["about_task"]["unit"]))]
        for v in timed:
            rate = found.get(v["id"])
            against = rate / base[key]["median"] if rate and key in base and v["id"] != report["baseline"] else None
            cells.append(Cell(words.rate(rate), words.ratio(against) if against else "", best=v["id"] == best))
        rows.append(cells)
    requests = sorted({time["requests"] for v in timed for time in v["throughput"].values()})
    flight = f"{requests[0]}" if len(requests) == 1 else f"{requests[0]} to {requests[-1]}"
    note = (
        f"Examples a second with {flight} request{'s' * (requests[-1] > 1)} in flight, as the runtime chose for the"
        f" threads; median of alternating rounds, with the rate against {report['baseline']}. Bold: the highest."
    )
    return Table("Throughput", ["Setting", *(v["id"] for v in timed)], rows, note)


_LEAST = ("min_size_ratio", "min_speedup", "agreement", "fused_attention", "effective_precision")
"""gates whose limit is the least that passes"""


def gates(report: Row) -> Table | None:
    if not report["gates"]:
        return None
    rows = []
    for gate in report["gates"]:
        kind = gate["name"].partition(".")[0]
        verdict = Cell("passed", tone="good") if gate["passed"] else Cell("missed", tone="bad")
        sign = "≥ " if kind in _LEAST else "≤ "
        value, limit = (_gate_value(report, kind, number) for number in (gate["value"], gate["limit"]))
        other = gate.get("not_counted")
        unused = f"{other['variant']}, {_gate_value(report, kind, other['value'])}, drops too much" if other else ""
        rows.append(
            [Cell(gate["name"]), verdict, Cell(gate["variant"] or "–", unused), Cell(value), Cell(sign + limit)]
        )
    note = "Size and speed gates count only variants whose own accuracy is inside max_drop."
    return Table("Gates", ["Gate", "Result", "Decided by", "Value", "Limit"], rows, note, text_columns=2)


def training(report: Row) -> Table | None:
    if not report["training"]:
        return None
    rows = [
        [
            Cell(row["stage"]),
            Cell(", ".join(methods(report, row["stage"])) or "fine-tuning"),
            Cell("pretrained model" if row["from"] == "model" else row["from"]),
            Cell(f"{row['steps']:,}", f"{row['total_steps']:,} in all" if row["total_steps"] != row["steps"] else ""),
        ]
        for row in report["training"]
    ]
    return Table("Training", ["Stage", "Methods", "Starts from", "Optimizer steps"], rows, text_columns=2)


def time(report: Row) -> Table | None:
    rows = [[Cell(str(name)), Cell(words.duration(seconds))] for name, seconds in report["wall_s"].items()]
    return Table("Wall time", ["Phase", "Time"], rows) if rows else None


def data(report: Row) -> Table | None:
    rows = [[Cell(str(name)), Cell(_plain(value))] for name, value in report["data"].items()]
    return Table("Data", ["Fact", "Value"], rows, text_columns=1) if rows else None


def environment(report: Row) -> Table:
    facts = {**report["host"], **{f"{name} version": version for name, version in report["versions"].items()}}
    rows = [[Cell(name.replace("_", " ")), Cell(_plain(value))] for name, value in facts.items()]
    return Table("Host and versions", ["Fact", "Value"], rows, text_columns=1)


def methods(report: Row, stage: str) -> list[str]:
    """What a stage of the recipe does besides fine-tuning, in words."""
    return report["methods"].get(stage, {}).get("words", [])


def tags(report: Row) -> list[str]:
    """What the recipe does, as words to search for."""
    found = [tag for stage in report["methods"].values() for tag in stage["tags"]]
    order = ("pruning", "quantization", "palettization")
    return sorted(dict.fromkeys(found), key=lambda tag: order.index(tag) if tag in order else len(order))


def _role(report: Row, variant: Row) -> str:
    advice = report["recommendation"] or {}
    roles = {"recommended": advice.get("id"), "smallest": advice.get("smallest")}
    found = [role for role, chosen in roles.items() if chosen == variant["id"] and chosen != report["baseline"]]
    return ", ".join(found)


def score(measured: Row | None) -> Cell:
    if measured is None:
        return Cell("–", tone="quiet")
    unit = measured["unit"]
    return Cell(words.metric(unit, measured["value"]), words.metric_range(unit, *measured["ci95"]))


def _difference(comparison: Row) -> Cell:
    name = comparison["metric"]
    delta, interval = comparison[f"{name}_delta"], comparison[f"{name}_delta_ci95"]
    return difference(comparison["unit"], delta, interval, comparison["verdict"])


def difference(unit: str, delta: float | None, interval: list[float | None], verdict: str | None) -> Cell:
    tones: dict[str | None, Literal["good", "warn", "bad"]] = {"tied": "good", "better": "good", "worse": "warn"}
    range_ = words.signed_range(unit, *interval)
    return Cell(words.signed(unit, delta), f"{verdict or 'not comparable'}: {range_}", tones.get(verdict, "bad"))


def _gate_value(report: Row, kind: str, value: float | None) -> str:
    if value is None:
        return words.NONE
    if kind == "max_drop" and report["metric"]:
        return words.drop(report["metric"]["unit"], value)
    if kind in ("min_size_ratio", "min_speedup"):
        return words.ratio(value)
    if kind == "agreement":
        return f"{100 * value:.1f}%"
    return words.small(value) if kind == "parity" else f"{value:g}"


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_plain(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(_plain(item) for item in value)
    if isinstance(value, bool) or value is None:
        return json.dumps(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
