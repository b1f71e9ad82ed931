"""comparison.json: variants of several runs side by side, each against one reference.

A difference is paired where both scored the same test rows (`test_hash` of the report's data, or, of runs before it
was kept, the hash of all their data) and the run folders still hold what every example contributed; else the row says
why it is not. The front holds the variants that no other one beats: none is at least as small, as fast and as good,
and better in one of them. Latencies count where all were measured on one processor.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mptrain.core.errors import MptrainError, UserError
from mptrain.measure.intervals import paired_difference
from mptrain.report.recommend import main_setting
from mptrain.report.row import Row

if TYPE_CHECKING:
    from mptrain.data.tasks.metrics import Score

SCHEMA = "mptrain.comparison/v1"
_SAYS_NOTHING = ("schema", "name", "description", "output", "presets")
"""fields of a recipe that no number depends on"""
_LONGEST = 90  # characters of a value in the table of what differs


@dataclass(frozen=True)
class Run:
    """name: by which the page knows it. folder: of its report. variants: ids, those to compare."""

    name: str
    folder: Path
    report: Row
    variants: tuple[str, ...]


def compare(runs: Sequence[Run], *, reference: str | None = None, setting: str | None = None) -> Row:
    """The facts, in JSON types.

    Keys: schema, task, about_task, metric, setting (of latency; None where there is no common one), reference, rows
    (id, run, variant, metrics, size_bytes, params, latency_ms, and against the reference size_ratio, speedup,
    difference {delta, ci95, verdict} or None with `unpaired`, the reason; on_front, None where it cannot be said;
    gates_passed), alike (ids left out, being the reference again), differs ({field, values by run}), runs, notes.

    Args:
        reference: id of a row, or the name of a run, whose baseline it then is; default: that of the first run.
        setting: of latency, e.g. b1_s128_t1. Default: the smallest batch, longest input and fewest threads of all.

    Raises UserError for runs of several tasks or metrics, and for a reference or a setting that there is not.
    """
    _check_alike(runs)
    rows = [_row(run, _variant(run, name)) for run in runs for name in run.variants]
    base = _reference(rows, runs, reference)
    by_name = {run.name: run for run in runs}
    scores = {row["id"]: _scores(by_name[row["run"]], row["variant"]) for row in rows}
    metric = runs[0].report["metric"]
    again = [r["id"] for r in rows if r is not base and _same_again(r, base, by_name, scores)]
    rows = [row for row in rows if row["id"] not in again]
    chosen = _setting(rows, setting)
    for row in rows:
        row.update(_against(row, base, by_name, scores, metric, chosen))
    timed = chosen is not None and len({_processor(run.report) for run in runs}) == 1
    _mark_front(rows, metric, chosen if timed else None)
    return {
        "schema": SCHEMA,
        "task": runs[0].report["task"],
        "about_task": runs[0].report["about_task"],
        "metric": metric,
        "setting": chosen,
        "reference": base["id"],
        "rows": rows,
        "alike": again,
        "differs": _differs(runs),
        "runs": [
            {"name": run.name, "created": run.report["created"], "cpu": run.report["host"].get("cpu")} for run in runs
        ],
        "notes": list(_notes(rows, runs, chosen, timed, again, base["id"])),
    }


def _check_alike(runs: Sequence[Run]) -> None:
    for run in runs:
        if run.report["metric"] is None:
            raise UserError(f"{run.folder}: the run exported nothing, so there is nothing to compare; leave it out.")
    for what, read in (("task", lambda r: r["task"]), ("metric", lambda r: r["metric"]["name"])):
        found = {read(run.report): run for run in runs}
        if len(found) > 1:
            (one, first), (other, second) = list(found.items())[:2]
            raise UserError(
                f"compare: the {what} of {first.folder} is {one}, that of {second.folder} is {other}: their scores say"
                f" different things. Compare runs of one {what} at a time."
            )


def _variant(run: Run, name: str) -> Row:
    return next(v for v in run.report["variants"] if v["id"] == name)


def _row(run: Run, variant: Row) -> Row:
    kept = ("stage", "format", "precision", "metrics", "size_bytes", "params", "latency_ms")
    gates = run.report["gates"]
    return {
        "id": f"{run.name}:{variant['id']}",
        "run": run.name,
        "variant": variant["id"],
        **{key: variant[key] for key in kept},
        "gates_passed": all(gate["passed"] for gate in gates) if gates else None,
    }


def _reference(rows: Sequence[Row], runs: Sequence[Run], wanted: str | None) -> Row:
    by_id = {row["id"]: row for row in rows}
    for run in runs:
        if wanted in (None, run.name):
            found = by_id.get(f"{run.name}:{run.report['baseline']}")
            return found or next(row for row in rows if row["run"] == run.name)
    if wanted not in by_id:
        raise UserError(f"--reference {wanted}: it is none of what is compared: {', '.join(by_id)}.")
    return by_id[wanted]


def _setting(rows: Sequence[Row], wanted: str | None) -> str | None:
    timed = [row["latency_ms"] for row in rows if row["latency_ms"]]
    common = [key for key in timed[0] if all(key in found for found in timed)] if timed else []
    if wanted is not None and wanted not in common:
        raise UserError(
            f"--setting {wanted}: not all that was timed was timed so; all were at {', '.join(common) or 'none'}."
        )
    return wanted or (main_setting(common) if common else None)


def _processor(report: Row) -> tuple[Any, ...]:
    return tuple(report["host"].get(key) for key in ("cpu", "cores_usable"))


# -- against the reference


def _scores(run: Run, variant: str) -> Score | str:
    """The main score of a variant as the run folder keeps it; or in words why there is none."""
    from mptrain.data.load import task_class
    from mptrain.data.tasks.metrics import Score
    from mptrain.recipe import TASKS

    kind = TASKS.get(run.report["task"])
    if kind is None:
        return f"the task {run.report['task']} is not known here"
    file = run.folder / "export" / f"{variant}.json"
    try:
        kept = json.loads(file.read_text(encoding="utf-8"))["scores"]
        found = [Score.from_kept(score, task_class(kind).measures) for score in kept]
    except (OSError, ValueError, KeyError, TypeError, MptrainError):
        return "its examples' scores are not kept"
    name = run.report["metric"]["name"]
    return next((score for score in found if score.name == name), f"its run folder holds no {name}")


def _test_rows(run: Run) -> tuple[str, str] | None:
    """What was scored, as a hash: of the test rows, or, before it was kept, of all data."""
    if (found := run.report["data"].get("test_hash")) is not None:
        return "test", found
    try:
        return "all", json.loads((run.folder / "run.json").read_text(encoding="utf-8"))["data_hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _same_rows(one: Run, other: Run) -> str | None:
    """None, or why not."""
    if one is other:
        return None
    ours, theirs = _test_rows(one), _test_rows(other)
    if ours is None or theirs is None:
        return "its test rows are not known"
    if ours[0] != theirs[0]:
        return "one of the runs is older than the hash of test rows: run it again"
    return None if ours == theirs else "other test rows" if ours[0] == "test" else "other data"


def _same_again(row: Row, base: Row, runs: Mapping[str, Run], scores: Mapping[str, Score | str]) -> bool:
    """Whether it is the reference in another run, as baselines of a sweep are: example by example, of one size."""
    ours, theirs = scores[row["id"]], scores[base["id"]]
    alike = all(row[key] == base[key] for key in ("variant", "size_bytes", "params"))
    if not alike or row["run"] == base["run"] or isinstance(ours, str) or isinstance(theirs, str):
        return False
    return _same_rows(runs[row["run"]], runs[base["run"]]) is None and ours.stats.tolist() == theirs.stats.tolist()


def _against(
    row: Row, base: Row, runs: Mapping[str, Run], scores: Mapping[str, Score | str], metric: Row, setting: str | None
) -> Row:
    if row is base:
        return {"difference": None, "unpaired": None, "size_ratio": 1.0, "speedup": None}
    found: Row = {"difference": None, "unpaired": _same_rows(runs[row["run"]], runs[base["run"]])}
    if found["unpaired"] is None:
        between = _reported(row, base, runs[base["run"]].report) or _paired(
            scores[row["id"]], scores[base["id"]], metric
        )
        found["unpaired" if isinstance(between, str) else "difference"] = between
    found["size_ratio"] = base["size_bytes"] / row["size_bytes"]
    times = [r["latency_ms"].get(setting) for r in (base, row)]
    same_host = _processor(runs[row["run"]].report) == _processor(runs[base["run"]].report)
    found["speedup"] = times[0]["median"] / times[1]["median"] if all(times) and same_host else None
    return found


def _reported(row: Row, base: Row, report: Row) -> Row | None:
    """The difference to its own baseline, as the report of the run has it."""
    if row["run"] != base["run"] or base["variant"] != report["baseline"]:
        return None
    found = next(c for c in report["comparisons"] if c["id"] == row["variant"])
    name = found["metric"]
    return {"delta": found[f"{name}_delta"], "ci95": found[f"{name}_delta_ci95"], "verdict": found["verdict"]}


def _paired(ours: Score | str, theirs: Score | str, metric: Row) -> Row | str:
    """The difference; or in words why there is none."""
    if isinstance(ours, str):
        return ours
    if isinstance(theirs, str):
        return f"of the reference, {theirs}"
    if ours.n != theirs.n:
        return f"{ours.n} examples, the reference has {theirs.n}"
    between = paired_difference(ours, theirs)
    values = [value if math.isfinite(value) else None for value in (between.value, between.low, between.high)]
    return {"delta": values[0], "ci95": values[1:], "verdict": between.verdict(metric["higher_is_better"])}


# -- the front


def _mark_front(rows: Sequence[Row], metric: Row, setting: str | None) -> None:
    """Sets on_front: True, False, or None for other test rows, a score or a time that is missing."""
    name, sign = metric["name"], -1 if metric["higher_is_better"] else 1
    timed = setting is not None and any(setting in row["latency_ms"] for row in rows)
    costs: dict[str, tuple[float, ...]] = {}
    for row in rows:
        value, time = row["metrics"][name]["value"], row["latency_ms"].get(setting)
        if value is not None and row["unpaired"] is None and (time or not timed):
            costs[row["id"]] = (row["size_bytes"], sign * value, *([time["median"]] if timed else []))
    for row in rows:
        ours = costs.get(row["id"])
        row["on_front"] = None if ours is None else not any(_beats(other, ours) for other in costs.values())


def _beats(one: tuple[float, ...], other: tuple[float, ...]) -> bool:
    return one != other and all(a <= b for a, b in zip(one, other))


# -- what differs


def _differs(runs: Sequence[Run]) -> list[Row]:
    """Fields of the recipes, then of the surroundings, that are not the same in all runs."""
    if len(runs) < 2:
        return []
    found = [dict(_surroundings(run)) for run in runs]
    recipes = [{key: value for key, value in run.report["recipe"].items() if key not in _SAYS_NOTHING} for run in runs]
    fields = [*_fields(recipes, ""), *_fields(found, "")]
    return [
        {"field": field, "values": {run.name: _short(value) for run, value in zip(runs, values)}}
        for field, values in fields
    ]


def _surroundings(run: Run) -> Iterator[tuple[str, Any]]:
    report = run.report
    yield "data that was read", {key: report["data"].get(key) for key in ("source", "rows", "test_hash")}
    yield "host", {"cpu": report["host"].get("cpu")}
    yield "versions", report["versions"]


def _fields(values: Sequence[Any], path: str) -> Iterator[tuple[str, list[Any]]]:
    """(path, values) where JSON values differ, as deep as all of them are of one shape; stages and exports by id."""
    if all(value == values[0] for value in values[1:]):
        return
    if all(isinstance(value, list) for value in values) and all(
        isinstance(item, dict) and "id" in item for value in values for item in value
    ):
        values = [{item["id"]: item for item in value} for value in values]
    if all(isinstance(value, dict) for value in values):
        for key in dict.fromkeys(key for value in values for key in value):
            yield from _fields([value.get(key) for value in values], f"{path}.{key}" if path else str(key))
    else:
        yield path, list(values)


def _short(value: Any) -> str:
    """A value of a recipe, without what it leaves out."""
    if value is None:
        return "–"
    text = value if isinstance(value, str) else json.dumps(_given(value), ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value


def _notes(
    rows: Sequence[Row], runs: Sequence[Run], setting: str | None, timed: bool, again: Sequence[str], base: str
) -> Iterator[str]:
    unpaired = [row for row in rows if row["unpaired"]]
    for reason in dict.fromkeys(row["unpaired"] for row in unpaired):
        ids = ", ".join(row["id"] for row in unpaired if row["unpaired"] == reason)
        yield f"Not paired with {base} ({reason}): {ids}."
    if again:
        yield f"Left out, being {base} again, example by example: {', '.join(again)}."
    if len(runs) > 1 and setting is not None:
        if timed:
            yield "Latencies of several runs were measured at different times, not in turns as those of one run are."
        else:
            yield "The runs were timed on different processors, so their latencies are not compared."
    elif setting is None and any(row["latency_ms"] for row in rows):
        yield "No setting of latency is common to all that was timed, so latencies are not compared."
