"""What a run achieved, one sentence to a claim, in words that the numbers bear.

"Tied" is said when the paired 95% interval of the difference includes zero, "worse" or
"better" when it excludes zero. Tied does not mean equal: the interval is always beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mptrain.report import words
from mptrain.report.gates import within
from mptrain.report.recommend import main_setting
from mptrain.report.row import Row

Tone = Literal["good", "bad", "warn", "plain"]


@dataclass(frozen=True)
class Claim:
    text: str
    tone: Tone


@dataclass(frozen=True)
class Tile:
    """A headline number with what it is about."""

    label: str
    value: str
    detail: str
    tone: Tone


def max_drop(report: Row) -> float | None:
    return report["recipe"]["gates"]["max_drop"]


def setting(report: Row) -> str | None:
    """The latency setting the report is summed up by."""
    if report["recommendation"]:
        return report["recommendation"]["setting"]
    settings = [key for v in report["variants"] for key in v["latency_ms"]]
    return main_setting(settings) if settings else None


def smallest(report: Row) -> Row | None:
    """Comparison of the smallest compressed variant inside the accuracy limit."""
    return max(_counting(report), key=lambda c: c["size_ratio"], default=None)


def fastest(report: Row) -> Row | None:
    """Comparison of the fastest compressed variant inside the limit, at the report's setting."""
    key = setting(report)
    timed = [c for c in _counting(report) if key in c["speedup"]]
    return max(timed, key=lambda c: c["speedup"][key], default=None)


def claims(report: Row) -> list[Claim]:
    """The verdict: size, speed, accuracy floor, multiple choice, training effort, gates."""
    found = []
    if report["comparisons"]:
        found += _compression(report)
    if report["floor"] and report["floor"]["lead"]:
        found.append(_floor(report))
    found += _choices(report)
    found += _effort(report)
    if report["gates"]:
        found.append(_gates(report))
    return found


def tiles(report: Row) -> list[Tile]:
    """Up to four headline numbers."""
    found = []
    small, fast, key = smallest(report), fastest(report), setting(report)
    sizes = {v["id"]: v["size_bytes"] for v in report["variants"]}
    if small:
        detail = f"{small['id']}: {words.megabytes(sizes[small['id']])} instead of {_size(report, small['vs'])}"
        tone: Tone = "good" if small["size_ratio"] > 1 else "warn"
        found.append(Tile("Smaller", words.ratio(small["size_ratio"]), detail, tone))
    if fast and key:
        detail = f"{fast['id']}: {words.setting_words(key, report['about_task']['unit'])}"
        tone = "good" if fast["speedup"][key] > 1 else "warn"
        found.append(Tile("Faster", words.ratio(fast["speedup"][key]), detail, tone))
    shown = small or min(report["comparisons"], key=_by_drop, default=None)
    if shown:
        name, unit = shown["metric"], shown["unit"]
        value = words.signed(unit, shown[f"{name}_delta"]) + words.points(unit)
        range_ = words.signed_range(unit, *shown[f"{name}_delta_ci95"])
        detail = f"{shown['id']}: {_verdict(shown)}, 95% interval {range_}"
        found.append(Tile(words.heading(name), value, detail, _tone(shown)))
    if report["gates"]:
        passed = sum(g["passed"] for g in report["gates"])
        every = passed == len(report["gates"])
        missed = ", ".join(g["name"] for g in report["gates"] if not g["passed"])
        detail = "all gates of the recipe passed" if every else f"missed: {missed}"
        found.append(Tile("Gates", f"{passed} of {len(report['gates'])}", detail, "good" if every else "bad"))
    return found


def accuracy_words(report: Row, comparison: Row) -> str:
    """ "accuracy 82.53% against 82.96% (−0.43 points, 95% interval −1.31 to +0.45: tied)"."""
    name, unit = comparison["metric"], comparison["unit"]
    value = {v["id"]: v["metrics"][name]["value"] for v in report["variants"] if name in v["metrics"]}
    delta, (low, high) = comparison[f"{name}_delta"], comparison[f"{name}_delta_ci95"]
    return (
        f"{words.metric_name(name)} {words.metric(unit, value[comparison['id']])} against"
        f" {words.metric(unit, value[comparison['vs']])} ({words.signed(unit, delta)}{words.points(unit)},"
        f" 95% interval {words.signed_range(unit, low, high)}: {_verdict(comparison)})"
    )


def _counting(report: Row) -> list[Row]:
    return [c for c in report["comparisons"] if within(c, max_drop(report))]


def _by_drop(comparison: Row) -> float:
    return float("inf") if comparison["drop"] is None else comparison["drop"]


def _verdict(comparison: Row) -> str:
    return comparison["verdict"] or "not comparable"


def _tone(comparison: Row) -> Tone:
    tones: dict[str | None, Tone] = {"tied": "good", "better": "good", "worse": "warn"}
    return tones.get(comparison["verdict"], "bad")


def _size(report: Row, variant: str) -> str:
    return words.megabytes(next(v["size_bytes"] for v in report["variants"] if v["id"] == variant))


def _compression(report: Row) -> list[Claim]:
    small, fast, key = smallest(report), fastest(report), setting(report)
    if small is None:
        best = min(report["comparisons"], key=_by_drop)
        return [
            Claim(
                f"No compressed variant stays within {words.drop(best['unit'], max_drop(report))} of {best['vs']}."
                f" The closest is {best['id']}: {accuracy_words(report, best)}.",
                "bad",
            )
        ]
    found = [
        Claim(
            f"{small['id']} is {words.smaller(small['size_ratio'])} than {small['vs']}"
            f" ({_size(report, small['id'])} instead of {_size(report, small['vs'])}),"
            f" with {accuracy_words(report, small)}.",
            _tone(small) if small["size_ratio"] > 1 else "warn",
        )
    ]
    if fast and key:
        speed = fast["speedup"][key]
        times = {v["id"]: v["latency_ms"][key]["median"] for v in report["variants"] if key in v["latency_ms"]}
        verb = "faster than" if speed > 1 else "the speed of"
        accuracy = "the accuracy given above" if fast is small else accuracy_words(report, fast)
        found.append(
            Claim(
                f"{fast['id']} is {words.ratio(speed)} {verb} {fast['vs']} on this host"
                f" ({words.milliseconds(times[fast['id']])} ms instead of {words.milliseconds(times[fast['vs']])} ms"
                f" at {words.setting_words(key, report['about_task']['unit'])}), with {accuracy}.",
                _tone(fast) if speed > 1 else "warn",
            )
        )
    return found


def _floor(report: Row) -> Claim:
    floor, name, unit = report["floor"], report["metric"]["name"], report["metric"]["unit"]
    lead = floor["lead"]
    verb = {"better": "beats", "worse": "is worse than"}.get(lead["verdict"], "is tied with")
    return Claim(
        f"The baseline {verb} {floor['name']} ({words.metric(unit, floor['metrics'][name]['value'])}):"
        f" {words.signed(unit, lead['value'])}{words.points(unit)},"
        f" 95% interval {words.signed_range(unit, *lead['ci95'])}.",
        "plain" if lead["verdict"] == "better" else "warn",
    )


def _choices(report: Row) -> list[Claim]:
    base: Row = next((v for v in report["variants"] if v["id"] == report["baseline"]), {})
    tasks = base.get("multiple_choice", {})
    return [_choice(report, task, name, score) for task, scores in tasks.items() for name, score in scores.items()]


def _choice(report: Row, task: str, name: str, base: Row) -> Claim:
    """Which variants are worse; nothing where the baseline is no better than luck, for nothing could be lost there."""
    unit = base["unit"]
    value = f"{words.metric(unit, base['value'])}, 95% interval {words.metric_range(unit, *base['ci95'])}"
    luck = report["multiple_choice"][task]["guessing"]
    if base["ci95"][0] is None or base["ci95"][0] <= luck:
        text = f"the baseline ({value}) is not above guessing ({words.metric(unit, luck)})"
        return Claim(f"{task} {name}: {text}, so what compression costs does not show there.", "warn")
    rows = {c["id"]: c["multiple_choice"][task][name] for c in report["comparisons"]}
    worse = [
        f"{variant} ({words.signed(unit, row['delta'])}{words.points(unit)},"
        f" {words.signed_range(unit, *row['delta_ci95'])})"
        for variant, row in rows.items()
        if row["verdict"] == "worse"
    ]
    if worse:
        return Claim(f"{task} {name}: worse than the baseline ({value}): {', '.join(worse)}.", "warn")
    return Claim(f"{task} {name}: no variant is worse than the baseline ({value}) by its paired interval.", "good")


def _effort(report: Row) -> list[Claim]:
    """A baseline trained for fewer steps than the model compared with it would be no fair one."""
    stage = next((v["stage"] for v in report["variants"] if v["id"] == report["baseline"]), "model")
    later = [row for row in report["training"] if row["stage"] != stage]
    if not later:
        return []
    steps = next((row["steps"] for row in report["training"] if row["stage"] == stage), 0)
    most = max(later, key=lambda row: row["steps"])
    fair = steps >= most["steps"]
    baseline = f"stage {stage}"
    trained = f"trained for {steps:,} optimizer steps"
    if stage == "model":
        baseline, trained = "the model as it was given", "not trained here"
    start = "the pretrained model" if most["from"] == "model" else f"stage {most['from']}"
    return [
        Claim(
            f"The baseline ({baseline}) was {trained}; stage"
            f" {most['stage']} for {most['steps']:,}, starting from {start} ({most['total_steps']:,} in all)"
            + ("." if fair else ": the compressed model had more training than the baseline."),
            "plain" if fair else "warn",
        )
    ]


def _gates(report: Row) -> Claim:
    missed = [g["name"] for g in report["gates"] if not g["passed"]]
    if missed:
        return Claim(f"{len(missed)} of {len(report['gates'])} gates missed: {', '.join(missed)}.", "bad")
    count = len(report["gates"])
    return Claim(f"All {count} gates of the recipe passed." if count > 1 else "The gate of the recipe passed.", "good")
