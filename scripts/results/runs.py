"""Runs of recipes, from their reports."""

from __future__ import annotations

import textwrap

from mptrain.core.errors import RecipeError
from mptrain.recipe import file
from mptrain.report import words
from mptrain.report.render.files import read
from scripts.results.drawn import RESULTS, SETTING, Row, cores, interval, link, load, signed, table, times, where


def heads(report: Row) -> list[str]:
    length = "tokens" if report.get("about_task", {}).get("unit", "tokens") == "tokens" else None
    return ["variant", words.metric_name(report["metric"]["name"]), "against dense", "size", timed_at(report, length)]


def timed_at(report: Row, length: str | None) -> str:
    key = setting(report)
    return words.setting_words(key, length) if key else ""


def setting(report: Row) -> str:
    """The one that is drawn; "" where nothing was timed."""
    every = next((v["latency_ms"] for v in report["variants"] if v["latency_ms"]), {})
    return SETTING if SETTING in every else next(iter(every), "")


def run_rows(report: Row, digits: int) -> list[list[str]]:
    """A line to each variant of a run: score, against dense, size, speed. digits: of points."""
    against = {comparison["id"]: comparison for comparison in report["comparisons"]}
    metric, unit, at = report["metric"]["name"], report["metric"]["unit"], setting(report)
    found = []
    for variant in report["variants"]:
        compared = against.get(variant["id"])
        scored = variant["metrics"].get(metric)  # none of a graph whose heads leave no logits
        cells = [variant["id"], _score(unit, scored["value"], digits) if scored else ""]
        size, timed = words.megabytes(variant["size_bytes"]), (variant["latency_ms"] or {}).get(at)
        speed = f"{timed['median']:.1f} ms" if timed else ""
        if compared is None:
            found.append([*cells, "", size, speed])
            continue
        difference = [compared.get(f"{metric}_delta"), *compared.get(f"{metric}_delta_ci95", (None, None))]
        delta, low, high = ("" if end is None else _signed(unit, end, digits) for end in difference)
        cells.append(f"{delta} ({low} to {high})" if delta else "")
        cells.append(f"{size}, {times(compared['size_ratio'])} smaller")
        ratio = (compared["speedup"] or {}).get(at)
        found.append([*cells, f"{speed}, {times(ratio)} as fast" if ratio else speed])
    return found


def _score(unit: str, value: float, digits: int) -> str:
    return f"{100 * value:.{digits}f}%" if unit == "fraction" else words.metric(unit, value)


def _signed(unit: str, value: float, digits: int) -> str:
    return signed(100 * value, digits) if unit == "fraction" else words.signed(unit, value)


METHODS = ("vocabulary", "prune", "quantize", "palettize", "distill")
OF_A_CUT = ("quantize.start", "quantize.carry")
"""settings of quantizers that say nothing where nothing is pruned"""


def otherwise(report: Row) -> list[str]:
    """Settings of methods with which the run was made, and which the bundled recipe does not have (any more)."""
    try:
        bundled = file.read(report["name"], []).recipe
    except RecipeError:  # it is not bundled
        return []
    now = {stage.id: _flat(stage.model_dump(mode="json")) for stage in bundled.stages}
    return [
        f"`stages.{stage['id']}.{name}: {str(ran).lower()}`"
        for stage in report["recipe"]["stages"]
        for name, ran in sorted(_flat(stage).items())
        if ran != now.get(stage["id"], {}).get(name, ran) and (stage.get("prune") or not name.endswith(OF_A_CUT))
    ]


def _flat(stage: Row) -> Row:
    """Settings of a stage's methods, their names with dots."""
    found: Row = {}
    for method in METHODS:
        for name, value in (stage.get(method) or {}).items():
            inner = value.items() if isinstance(value, dict) else [("", value)]
            found |= {f"{method}.{name}.{key}".rstrip("."): one for key, one in inner}
    return found


def runs() -> list[str]:
    text = [
        "## Recipes, as they are bundled",
        "",
        "Scored on a test split that training did not see: of the film reviews, reviews of other films. Differences of"
        " shares are in points, all are paired, with their 95% interval. The speed of int8 needs VNNI or AMX; that of"
        " the pruned fp32 models does not. Core ML and Core AI models were scored by the interpreter and by emulation,"
        " not on a device, and are not timed. A recipe that is missing here has no report in the repository.",
        "",
    ]
    for path in sorted((RESULTS / "runs").glob("*.json")):
        report = read(path)
        scored = report["variants"][0]["metrics"].get(report["metric"]["name"])
        n = f"{scored['n']:,} test examples" if scored else "not scored"
        text += [
            f"### {path.stem}",  # of a bundled recipe, or of one with other settings, which then are named
            "",
            f"{report['recipe']['description'][:1].upper()}{report['recipe']['description'][1:]}. {n};"
            f" {cores(report)} of {where(report)}; {words.duration(report['wall_s']['total'])} in all"
            f" ({link(f'runs/{path.name}', path.name)}).{' '.join(['', *made_with(report)])}",
            "",
            *table(heads(report), run_rows(report, 1)),
            "",
        ]
    return text


def made_with(report: Row) -> list[str]:
    """A sentence, where the recipe has other settings now."""
    settings = otherwise(report)
    return [f"Made with {' and '.join(settings)}, which the recipe does not have."] if settings else []


def over_seeds() -> list[str]:
    """What the run is one of."""
    found = load("jpqd_seeds_default.json")["rows"]
    return [f"It is one seed: over {len(found) - 1}, accuracy is {interval(found[-1]['delta'])} points from dense."]


def readme_table() -> list[str]:
    report = read(RESULTS / "runs" / "jpqd-bert.json")
    names = {
        "baseline_fp32": "dense fp32",
        "pruned_fp32": "pruned fp32",
        "jpqd_int8": "pruned int8",
        "jpqd_int8_emb4": "pruned int8, int4 embedding",
    }
    lines = [[names[line[0]], *line[1:]] for line in run_rows(report, 1)]
    n = report["variants"][0]["metrics"]["accuracy"]["n"]
    text = (
        f"`mptrain recipe jpqd-bert` on {cores(report)} of {where(report)}, in {report['wall_s']['total'] / 60:.0f}"
        f" minutes; {n:,} reviews of films that training did not see; paired differences in points with their 95%"
        f" interval. {' '.join([*made_with(report), *over_seeds(), ''])}All other results:"
        " [docs/results.md](docs/results.md), each with the command that made it."
    )
    return [
        *table(["", *heads(report)[1:]], lines),
        "",
        *textwrap.wrap(text, 120, break_long_words=False, break_on_hyphens=False),
    ]
