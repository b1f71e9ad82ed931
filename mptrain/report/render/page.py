"""report.html: one self-contained page. No script, no request; a policy in its head forbids both."""

from __future__ import annotations

from typing import Any

import yaml

from mptrain.report import claims
from mptrain.report.render.html import figures, fill
from mptrain.report.row import Row
from mptrain.report.tables import choices, generation, models, results

NO_PLOTS = 'Figures need matplotlib: pip install "mptrain[plots]", then render again with mptrain report.'
INTERVALS = (
    "Wilson for accuracy and Tango's score interval for its paired differences, percentile bootstrap over examples"
    " for other metrics."
)
_MARKS = {"good": "✓", "warn": "!", "bad": "✗", "plain": "•"}


def page(report: Row) -> str:
    recipe = report["recipe"]
    return fill(
        "page.html.j2",
        title=f"{report['name']}: compression report",
        report=report,
        description=recipe["description"].rstrip(". "),
        task=report["task"].replace("-", " ").capitalize(),
        model=recipe["model"].get("module") or recipe["model"]["path"],
        created=report["created"][:10],
        cpu=report["host"].get("cpu", "unknown CPU"),
        tiles=claims.tiles(report),
        claims=claims.claims(report),
        marks=_MARKS,
        warnings=[*(report["recommendation"] or {}).get("warnings", []), *report["notes"]],
        t={
            "results": results.results(report),
            "choices": choices.table(report),
            "latency": results.latency(report),
            "generation": generation.table(report),
            "throughput": results.throughput(report),
            "gates": results.gates(report),
            "structure": models.structure(report),
            "compressed": models.compressed(report),
            "restored": models.restored(report),
            "training": results.training(report),
            "runtime": models.runtime(report),
            "half": models.half(report),
            "data": results.data(report),
            "time": results.time(report),
            "environment": results.environment(report),
        },
        layer_lists=models.layer_lists(report),
        plots=figures("plots", report),
        no_plots=NO_PLOTS,
        recipe=yaml.safe_dump(_given(recipe), sort_keys=False, allow_unicode=True, width=100),
        intervals=INTERVALS,
    )


def _given(value: Any) -> Any:
    """A recipe without the fields that were left out."""
    if isinstance(value, dict):
        return {key: _given(item) for key, item in value.items() if item is not None}
    return [_given(item) for item in value] if isinstance(value, list) else value
