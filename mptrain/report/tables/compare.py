"""Tables of a comparison of runs: the variants side by side, and what differs in their recipes."""

from __future__ import annotations

from mptrain.report import words
from mptrain.report.row import Row
from mptrain.report.tables.results import Cell, Table, difference, score

_MEANING = (
    "Beside each score its 95% interval, beside the difference its paired 95% interval and what that means. Front: no"
    " other variant is at least as small, as fast and as good, and better in one of them."
)


def results(found: Row) -> Table:
    """One row per variant: metrics, difference to the reference, size, latency, whether it is on the front."""
    rows, key = found["rows"], found["setting"]
    names = list(dict.fromkeys(name for row in rows for name in row["metrics"]))
    largest = max(row["size_bytes"] for row in rows)
    slowest = max((row["latency_ms"][key]["median"] for row in rows if key in row["latency_ms"]), default=1)
    gates = any(row["gates_passed"] is not None for row in rows)
    columns = ["Variant", *(words.heading(name) for name in names), "Difference", "Size"]
    columns += [*(["Latency"] if key else []), "Front", *(["Gates"] if gates else [])]
    cells = []
    for row in rows:
        line = [Cell(row["variant"], row["run"]), *(score(row["metrics"].get(name)) for name in names)]
        line.append(_difference(found, row))
        line.append(_size(found, row, largest))
        if key:
            line.append(_latency(row, key, slowest))
        line.append(_FRONT[row["on_front"]])
        if gates:
            line.append(_GATES[row["gates_passed"]])
        cells.append(line)
    note = f"Differences are to {found['reference']}. {_MEANING}"
    if key:
        note += f" Latency at {words.setting_words(key, found['about_task']['unit'])}."
    return Table("Comparison", columns, cells, note)


_FRONT = {True: Cell("on it", tone="good"), False: Cell("beaten", tone="quiet"), None: Cell("–", tone="quiet")}
_GATES = {True: Cell("passed", tone="good"), False: Cell("missed", tone="bad"), None: Cell("none", tone="quiet")}


def _difference(found: Row, row: Row) -> Cell:
    if row["id"] == found["reference"]:
        return Cell("reference", tone="quiet")
    between = row["difference"]
    if between is None:
        return Cell("not paired", row["unpaired"], "quiet")
    return difference(found["metric"]["unit"], between["delta"], between["ci95"], between["verdict"])


def _size(found: Row, row: Row, largest: float) -> Cell:
    than = "" if row["id"] == found["reference"] else words.smaller(row["size_ratio"])
    return Cell(words.megabytes(row["size_bytes"]), than, bar=row["size_bytes"] / largest)


def _latency(row: Row, key: str, slowest: float) -> Cell:
    if key not in row["latency_ms"]:
        return Cell("not timed", tone="quiet")
    time = row["latency_ms"][key]["median"]
    fast = f"{words.ratio(row['speedup'])} as fast" if row["speedup"] else ""
    return Cell(f"{words.milliseconds(time)} ms", fast, bar=time / slowest)


def differs(found: Row) -> Table | None:
    """A row to each field of the recipes, or of what surrounds them, that is not the same in all runs."""
    names = [run["name"] for run in found["runs"]]
    rows = [[Cell(row["field"]), *(Cell(row["values"][name]) for name in names)] for row in found["differs"]]
    return Table("What differs", ["Field", *names], rows, text_columns=len(names)) if rows else None
