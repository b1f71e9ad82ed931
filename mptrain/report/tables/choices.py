"""The table of multiple-choice tasks."""

from __future__ import annotations

from mptrain.report import words
from mptrain.report.row import Row
from mptrain.report.tables.results import Cell, Table, difference, score


def table(report: Row) -> Table | None:
    """One row per variant, for every metric of every task a score and the paired difference to the baseline."""
    tasks = report.get("multiple_choice")
    if not tasks or not report["variants"]:
        return None
    names = [(task, metric) for task, found in report["variants"][0]["multiple_choice"].items() for metric in found]
    columns = ["Variant"]
    for task, metric in names:
        columns += [f"{task} {metric}", "Difference"]
    compared = {c["id"]: c["multiple_choice"] for c in report["comparisons"]}
    rows = []
    for v in report["variants"]:
        cells = [Cell(v["id"])]
        for task, metric in names:
            measured = v["multiple_choice"][task][metric]
            row = compared[v["id"]][task][metric] if v["id"] in compared else None
            unit = measured["unit"]
            cells.append(score(measured))
            cells.append(difference(unit, row["delta"], row["delta_ci95"], row["verdict"]) if row else _BASELINE)
        rows.append(cells)
    guessing = [Cell("guessing", "all choices alike")]
    for task, _ in names:
        guessing += [Cell(words.metric("fraction", tasks[task]["guessing"])), Cell("–", tone="quiet")]
    return Table("Multiple choice", columns, [*rows, guessing], " ".join([_MEANING, *map(_scored, tasks.items())]))


_BASELINE = Cell("baseline", tone="quiet")
_MEANING = (
    "acc: the choice whose tokens are the most probable is right; acc_norm: log-probability by the characters of the"
    " choice. Both as lm-eval computes them; beside each its 95% interval, questions treated as independent."
)


def _scored(task: tuple[str, Row]) -> str:
    name, facts = task
    text = f"{name}: {facts['questions']:,} questions of {facts['split']}, {facts['num_fewshot']}-shot"
    if facts["truncated"]:
        text += f", {facts['truncated']:,} choices with contexts cut to the length of the model"
    return f"{text}."
