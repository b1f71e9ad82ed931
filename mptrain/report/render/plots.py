"""Figures of a report. Needs matplotlib (the `plots` extra)."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from mptrain.report import claims, words
from mptrain.report.render.drawing import INK, LINE, MARKERS, MUTED, SERIES, Plot, drawn, short_name
from mptrain.report.row import Row
from mptrain.report.tables.models import count

POINTS = 300  # of a line; longer histories are thinned


def plots(report: Row) -> list[Plot]:
    """Every figure this report has data for."""
    drawings: list[tuple[str, str, str, Callable[[Row], Figure | None]]] = [
        ("tradeoff", "Accuracy against size and latency", _TRADEOFF, _tradeoff),
        ("difference", "Difference to the baseline", _DIFFERENCE, _difference),
        ("lengths", "Latency against length", _LENGTHS, _lengths),
        ("sparsity", "Sparsity over training", _SPARSITY, _sparsity),
        ("losses", "Losses over training", _LOSSES, _losses),
        ("layers", "Parameters kept per layer", _LAYERS, _layers),
        ("structure", "Heads and FFN channels kept per layer", _STRUCTURE, _structure),
        ("validation", "Validation over training", _VALIDATION, _validation),
    ]
    return drawn(drawings, report)


def compared(found: Row) -> list[Plot]:
    """Figures of a comparison of runs (`report.compare`)."""
    return drawn([("front", "Score against size and latency", _FRONT, _front)], found)


def thin(xs: Sequence[float], ys: Sequence[float], limit: int = POINTS) -> tuple[np.ndarray, np.ndarray]:
    """At most `limit` points: means of consecutive equal parts, x and y alike."""
    x, y = np.asarray(xs, float), np.asarray(ys, float)
    if len(x) <= limit:
        return x, y
    return _part_means(x, limit), _part_means(y, limit)


def _part_means(values: np.ndarray, parts: int) -> np.ndarray:
    return np.array([part.mean() for part in np.array_split(values, parts)])


_TRADEOFF = "Each point is an exported model, measured on this host; bars are 95% intervals. Up and left is better."
_FRONT = "Filled: on the front, no other variant beats it; hollow: beaten, or not to be compared. Bars: 95% intervals."
_DIFFERENCE = "Points: the difference on the same test examples. Bars: paired 95% intervals; one across zero is a tie."
_LENGTHS = (
    "Median time of a call by the length of its input, in turns on this host, at the first batch and thread count."
)
_SPARSITY = "Share of the encoder's parameters that the masks take out while they grow; then the model is shrunk."
_LOSSES = "Means between two log entries; the total is the sum the optimizer sees."
_LAYERS = "Parameters of attention and FFN in the exported structure, over those before pruning."
_STRUCTURE = "Filled: kept. Each dot is an attention head; the bars are the widths of the feed-forward networks."
_VALIDATION = "Scores on the validation split, which chooses checkpoints; the test split is not looked at."


def _tradeoff(report: Row) -> Figure | None:
    if len(report["variants"]) < 2:
        return None
    panels = _costs(claims.setting(report), report["about_task"])
    return _scatter(report["variants"], panels, report["metric"])


def _front(found: Row) -> Figure | None:
    beaten = {row["id"] for row in found["rows"] if not row["on_front"]}
    return _scatter(found["rows"], _costs(found["setting"], found["about_task"]), found["metric"], beaten)


def _costs(key: str | None, about: Row) -> list[tuple[str, Callable[[Row], float | None]]]:
    """Size and, at a setting, latency: what an axis says, and the value of a variant."""
    panels: list[tuple[str, Callable[[Row], float | None]]] = [("Size (MB)", lambda v: v["size_bytes"] / 1e6)]
    if key:
        title = f"Latency (ms; {words.setting_words(key, about['unit'])})"
        panels.append((title, lambda v: v["latency_ms"].get(key, {}).get("median")))
    return panels


def _scatter(
    rows: Sequence[Row],
    panels: Sequence[tuple[str, Callable[[Row], float | None]]],
    metric: Row,
    dominated: Collection[str] = (),
) -> Figure:
    """Score against each cost. rows: with id and metrics; dominated: ids that are drawn hollow."""
    figure = Figure(figsize=(11.4, 3.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    scale = 100 if metric["unit"] == "fraction" else 1
    for ax, (title, cost) in zip(axes, panels, strict=True):
        for i, v in enumerate(rows):
            measured, x = v["metrics"].get(metric["name"]), cost(v)
            if x is None or measured is None or measured["value"] is None:
                continue
            y, (low, high) = measured["value"], measured["ci95"]
            around = [[scale * (y - low)], [scale * (high - y)]] if low is not None else None
            ax.errorbar(
                x, scale * y, yerr=around, color=SERIES[i % 6], marker=MARKERS[i % 6], markersize=6.5, elinewidth=1,
                capsize=2.5, linestyle="none", label=short_name(v["id"]),
                markerfacecolor="none" if v["id"] in dominated else SERIES[i % 6],
            )  # fmt: skip
        ax.set_xlabel(title)
        ax.set_xlim(left=0)
    axes[0].set_ylabel(words.metric_name(metric["name"]) + (" (%)" if scale == 100 else ""))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 4))
    return figure


def _difference(report: Row) -> Figure | None:
    rows = [c for c in report["comparisons"] if c[f"{c['metric']}_delta_ci95"][0] is not None]
    if not rows:
        return None
    metric, unit = rows[0]["metric"], rows[0]["unit"]
    scale = 100 if unit == "fraction" else 1
    figure = Figure(figsize=(11.4, 0.7 + 0.3 * len(rows)), layout="constrained")
    ax = figure.subplots()
    for i, c in enumerate(rows):
        value, (low, high) = c[f"{metric}_delta"], c[f"{metric}_delta_ci95"]
        position = [v["id"] for v in report["variants"]].index(c["id"])
        ax.errorbar(
            scale * value, i, xerr=[[scale * (value - low)], [scale * (high - value)]], color=SERIES[position % 6],
            marker=MARKERS[position % 6], markersize=6.5, elinewidth=1.4, capsize=3, linestyle="none",
        )  # fmt: skip
    ax.axvline(0, color=INK, linewidth=0.9)
    limit = claims.max_drop(report)
    if limit is not None and unit != "number":  # of a number the limit is relative
        ax.axvline(-scale * limit, color=SERIES[1], linewidth=1, linestyle=(0, (4, 3)))
        ax.annotate("max_drop", (-scale * limit, 1), (3, -1), xycoords=("data", "axes fraction"),
                    textcoords="offset points", va="top", fontsize=8, color=MUTED)  # fmt: skip
    ax.set_yticks(range(len(rows)), [short_name(c["id"]) for c in rows])
    ax.set_ylim(len(rows) - 0.4, -0.6)
    ax.grid(axis="y", visible=False)
    ax.set_xlabel(
        f"{words.metric_name(metric)}, difference to {short_name(rows[0]['vs'])}{' (points)' if scale == 100 else ''}"
    )
    return figure


def _lengths(report: Row) -> Figure | None:
    measured = report["recipe"]["evaluate"]["latency"]
    unit, lengths = report["about_task"]["unit"], sorted(measured["length"])
    keys = {n: f"b{measured['batch'][0]}_s{n}_t{measured['threads'][0]}" for n in lengths}
    timed = [v for v in report["variants"] if all(key in v["latency_ms"] for key in keys.values())]
    if unit is None or len(lengths) < 3 or not timed:
        return None
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    ax = figure.subplots()
    for i, v in enumerate(timed):
        times = [v["latency_ms"][key]["median"] for key in keys.values()]
        ax.plot(lengths, times, color=SERIES[i % 6], marker=MARKERS[i % 6], markersize=4, label=short_name(v["id"]))
    ax.set_xlim(left=0)
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"Length ({unit})")
    ax.set_ylabel("Latency (ms)")
    ax.legend()
    return figure


def _sparsity(report: Row) -> Figure | None:
    figure = _lines(report, {"compress/sparsity": "sparsity"}, "Parameters removed")
    if figure is not None:
        figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
        figure.axes[0].set_ylim(bottom=0)
    return figure


def _losses(report: Row) -> Figure | None:
    return _lines(report, {"loss": "total", "task_loss": "task", "distill_loss": "distillation"}, "Loss")


def _validation(report: Row) -> Figure | None:
    if not report["metric"]:
        return None
    metric = report["metric"]["name"]
    figure = _lines(report, {f"eval/{metric}": words.metric_name(metric)}, words.metric_name(metric), marker="o")
    if figure is not None and report["metric"]["unit"] == "fraction":
        figure.axes[0].yaxis.set_major_formatter(PercentFormatter(1, decimals=1))
    return figure


def _lines(report: Row, series: dict[str, str], label: str, marker: str | None = None) -> Figure | None:
    """The series over all optimizer steps of the run, stages one after the other."""
    rows, stages = _timeline(report["history"])
    drawn = {name: [(x, row[name]) for x, row in rows if row.get(name) is not None] for name in series}
    drawn = {name: points for name, points in drawn.items() if points}
    if not drawn:
        return None
    # Only the stages that logged one of the series.
    used = {row["stage"] for _, row in rows if any(row.get(name) is not None for name in drawn)}
    spans = [(stage, start, end) for stage, start, end in stages if stage in used]
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    ax = figure.subplots()
    for i, (name, points) in enumerate(drawn.items()):
        # One line to a stage: the next starts from another model.
        pieces = [[(x, y) for x, y in points if start < x <= end] for _, start, end in spans]
        for j, piece in enumerate(piece for piece in pieces if piece):
            xs, ys = thin([x for x, _ in piece], [y for _, y in piece])
            label_once = None if j else series[name]
            ax.plot(xs, ys, color=SERIES[i], marker=marker, markersize=4, label=label_once, clip_on=not marker)
    marks = [(start, stage) for stage, start, _ in spans] if len(spans) > 1 else []
    marks += [(x, phase) for x, phase in _boundaries(rows) if any(start < x < end for _, start, end in spans)]
    for x, name in marks:
        ax.axvline(x, color=MUTED, linewidth=0.8, linestyle=(0, (2, 3)))
        ax.annotate(short_name(name), (x, 1), (2, 2), xycoords=("data", "axes fraction"), textcoords="offset points",
                    fontsize=8, color=MUTED, annotation_clip=False)  # fmt: skip
    ax.set_xlim(spans[0][1], spans[-1][2])
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_xlabel("Optimizer step of the run")
    ax.set_ylabel(label)
    if len(drawn) > 1:
        ax.legend()
    return figure


def _timeline(history: Sequence[Row]) -> tuple[list[tuple[int, Row]], list[tuple[str, int, int]]]:
    """(step of the run, row) and (stage, first step, last step): a stage's steps start at its own 0."""
    stages: list[tuple[str, int, int]] = []
    rows = []
    for row in history:
        if not stages or stages[-1][0] != row["stage"]:
            end = stages[-1][2] if stages else 0
            stages.append((row["stage"], end, end))
        stage, start, end = stages[-1]
        stages[-1] = (stage, start, max(end, start + row["step"]))
        rows.append((start + row["step"], row))
    return rows, stages


def _boundaries(rows: Sequence[tuple[int, Row]]) -> list[tuple[int, str]]:
    """(step, phase that begins) where a phase follows another of its stage: the model changed there."""
    pairs = itertools.pairwise(rows)
    return [
        (x, b["phase"]) for (x, a), (_, b) in pairs if a["stage"] == b["stage"] and a.get("phase") != b.get("phase")
    ]


def _layers(report: Row) -> Figure | None:
    layers = (report["structure"] or {}).get("layers")
    if not layers:
        return None
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    ax = figure.subplots()
    x = np.arange(len(layers))
    total = np.array([layer["params_total"] for layer in layers]) / 1e6
    kept = np.array([layer["params"] for layer in layers]) / 1e6
    ax.bar(x, total, color=LINE, label="before", width=0.72)
    ax.bar(x, kept, color=SERIES[0], label="kept", width=0.72)
    for i in x if len(layers) <= 16 else []:
        share = f"{100 * kept[i] / total[i]:.0f}%" if total[i] else ""
        ax.annotate(share, (i, kept[i]), (0, 2), textcoords="offset points", ha="center", fontsize=8, color=INK)
    _layer_axis(ax, len(layers))
    ax.set_ylabel("Parameters (M)")
    ax.set_ylim(top=1.18 * total.max() if total.max() else 1)
    ax.legend(loc="upper right", ncols=2)
    return figure


def _structure(report: Row) -> Figure | None:
    layers = (report["structure"] or {}).get("layers")
    if not layers:
        return None
    figure = Figure(figsize=(5.6, 3.0), layout="constrained")
    heads = max(layer["heads_total"] for layer in layers)
    if heads:
        top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
        _heads(top, layers, heads)
    else:
        bottom = figure.subplots()
    x = np.arange(len(layers))
    bottom.bar(x, [layer["ffn_total"] for layer in layers], color=LINE, width=0.72)
    bottom.bar(x, [count(layer["ffn"]) for layer in layers], color=SERIES[2], width=0.72)
    bottom.set_ylabel("FFN channels" if heads else "Channels")
    _layer_axis(bottom, len(layers))
    return figure


def _heads(ax: Axes, layers: list[Row], heads: int) -> None:
    for i, layer in enumerate(layers):
        total = layer["heads_total"]
        chosen = layer["heads"] if isinstance(layer["heads"], list) else range(layer["heads"])
        dropped = [head for head in range(total) if head not in set(chosen)]
        size = max(6.0, min(34.0, 500 / max(total, 2 * len(layers))))
        ax.scatter([i] * len(dropped), dropped, s=size, facecolors="none", edgecolors=MUTED, linewidths=0.7)
        ax.scatter([i] * len(list(chosen)), list(chosen), s=size, color=SERIES[0])
    ax.set_ylim(-0.8, heads - 0.2)
    ax.set_ylabel("Head")
    ax.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.grid(visible=False)


def _layer_axis(ax: Axes, layers: int) -> None:
    step = max(1, -(-layers // 12))
    ax.set_xticks(range(0, layers, step))
    ax.set_xlabel("Layer")
    ax.grid(axis="x", visible=False)
