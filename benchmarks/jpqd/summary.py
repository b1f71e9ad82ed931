"""The table and the Pareto plot of benchmarks/jpqd/curve.py, from its JSON lines alone."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.measure.intervals import paired_difference

SETTING = "b1_s128_t1"
COLOURS = {
    "curvature": "#c0392b",
    "fisher": "#1b6ca8",
    "magnitude": "#b5541c",
    "movement": "#3d8b37",
    "qat_int8": "#666666",
}
PEERS = {"torch_pruning": "#8e44ad", "modelopt_gradnas": "#c9a227"}
STYLES = {"joint": "-o", "sequential": "--s", "one_shot": ":^", "-": "D"}


def row(line: dict[str, Any]) -> dict[str, Any] | None:
    """What the table says about a point: its int8 variant for accuracy and size, pruned fp32 for speed."""
    method, order, kept, seed = line["point"].split("/")
    compared = {c["id"]: c for c in line["comparisons"]}
    if method == "dense":
        return None
    int8 = next((c for i, c in compared.items() if i.endswith("_int8")), None)
    emb4 = next((c for i, c in compared.items() if i.endswith("_int8_emb4")), None)
    fp32 = next((c for i, c in compared.items() if i.endswith("_fp32")), None)
    main = int8 or fp32
    return {
        "method": method,
        "order": order,
        "kept": int(kept),
        "seed": int(seed),
        "delta": main["accuracy_delta"],
        "ci": main["accuracy_delta_ci95"],
        "delta_fp32": fp32["accuracy_delta"] if fp32 else None,
        "delta_emb4": emb4["accuracy_delta"] if emb4 else None,
        "size": main["size_ratio"],
        "size_emb4": emb4["size_ratio"] if emb4 else None,
        "speed_fp32": fp32["speedup"][SETTING] if fp32 else None,
        "speed_int8": int8["speedup"][SETTING] if int8 else None,
    }


def verdict(ci: Sequence[float]) -> str:
    """Against the dense model: the paired 95% interval decides."""
    return "ahead" if ci[0] > 0 else "behind" if ci[1] < 0 else "tied"


def summarize(lines: list[dict[str, Any]], path: Path) -> str:
    """Write PATH's .md and .png beside it and return the table."""
    rows = [r for r in (row(line) for line in lines) if r is not None]
    rows.sort(key=lambda r: (-r["kept"], r["method"], r["order"], r["seed"]))
    points = "{:+.1f}".format
    text = ["# JPQD against how much of the encoder is kept", ""]
    dense = [line for line in lines if line["point"].startswith("dense/")]
    if dense:
        scores = [line["variants"][0]["metrics"]["accuracy"] for line in dense]
        values = [score["value"] for score in scores]
        text.append(
            f"Dense baseline: {', '.join(f'{100 * s:.1f}%' for s in values)} on {scores[0]['n']:,} test"
            " examples (one number per seed). Differences are in points against the dense model of the same seed,"
            " with the paired 95% interval. Size of the int8 model and speed at batch 1, length 128, one thread."
        )
        text.append("")
    heads = ["method", "order", "kept", "seed", "int8 accuracy", "95% interval", "verdict", "fp32", "int8+int4 emb."]
    heads += ["size", "size, int4 emb.", "speed fp32", "speed int8"]
    text += ["| " + " | ".join(heads) + " |", "|---|---|--:|--:|--:|---|---|--:|--:|--:|--:|--:|--:|"]
    for r in rows:
        cells = [r["method"], r["order"], f"{r['kept']}%", str(r["seed"]), points(100 * r["delta"])]
        cells += [f"{points(100 * r['ci'][0])} … {points(100 * r['ci'][1])}", verdict(r["ci"])]
        cells += [points(100 * r[k]) if r[k] is not None else "" for k in ("delta_fp32", "delta_emb4")]
        cells += [f"{r[k]:.2f}×" if r[k] else "" for k in ("size", "size_emb4", "speed_fp32", "speed_int8")]
        text.append("| " + " | ".join(cells) + " |")
    for part in (means(lines), orders(lines), against(lines, ["magnitude"]), against(lines, list(PEERS))):
        text += ["", *part] if part else []
    hosts = {line["host"]["cpu"] for line in lines}
    text += ["", f"Points were measured on: {', '.join(sorted(hosts))}. Ratios are within a point, so within a host."]
    table = "\n".join(text) + "\n"
    path.with_suffix(".md").write_text(table)
    _plot(rows, path.with_suffix(".png"))
    return table


def means(lines: list[dict[str, Any]]) -> list[str]:
    """Joint order: means over seeds, and over all points below 50%, against dense and against magnitude.

    An example counts with its mean over the points, so the intervals are over test examples for these seeds.
    """
    right = {tuple(line["point"].split("/")): _right(line) for line in lines}
    dense = {line["point"].split("/")[-1]: _right(line, "baseline_fp32") for line in lines}
    joint = {(m, int(kept), seed): r for (m, order, kept, seed), r in right.items() if order == "joint" and r}
    text = ["| method | kept | points | against dense | against magnitude | verdict |", "|---|--:|--:|---|---|---|"]
    sizes = {str(kept): [kept] for kept in sorted({kept for _, kept, _ in joint}, reverse=True)}
    sizes["below 50"] = [kept for _, kept, _ in joint if kept < 50]
    for name, kepts in sizes.items():
        for method in ("fisher", "magnitude", "movement"):
            ours = {k: r for k, r in joint.items() if k[0] == method and k[1] in kepts}
            pairs = [(r, joint[other]) for k, r in ours.items() if (other := ("magnitude", *k[1:])) in joint]
            if len(ours) < 2 or (method != "magnitude" and len(pairs) < 2):
                continue
            drop = _mean_difference([(r, dense[k[2]]) for k, r in ours.items()])[0]
            cells = [method, f"{name}%", str(len(ours)), drop]
            cells += ["", ""] if method == "magnitude" else _mean_difference(pairs)
            text.append("| " + " | ".join(cells) + " |")
    head = (
        "Means over seeds (below 50%: over sizes too; against magnitude: where both have points), joint, int8, points:"
    )
    return [head, "", *text] if len(text) > 2 else []


def _mean_difference(pairs: Sequence[tuple[list[int] | None, list[int] | None]]) -> list[str]:
    """["difference (interval)", verdict] of the means over pairs of (ours, theirs)."""
    ours, theirs = np.mean([[a, b] for a, b in pairs if a and b], axis=0)
    found = paired_difference(_score(ours), _score(theirs))
    interval = f"{100 * found.low:+.1f} … {100 * found.high:+.1f}"
    return [f"{100 * found.value:+.2f} ({interval})", verdict((found.low, found.high))]


def orders(lines: list[dict[str, Any]]) -> list[str]:
    """Sequential against joint, and all such pairs together."""
    right = {line["point"]: _right(line) for line in lines}
    text = ["| method | kept | seed | difference (95% interval) | verdict |", "|---|--:|--:|---|---|"]
    every = []
    for point, ours in right.items():
        method, order, kept, seed = point.split("/")
        theirs = right.get(f"{method}/joint/{kept}/{seed}")
        if order == "sequential" and ours and theirs:
            every.append((ours, theirs))
            text.append(f"| {method} | {kept}% | {seed} | {' | '.join(_mean_difference(every[-1:]))} |")
    if len(every) > 1:
        text.append(f"| all | | | {' | '.join(_mean_difference(every))} |")
    return ["Sequential (quantizers from the boundary on) against joint, int8, points:", "", *text] if every else []


def against(lines: list[dict[str, Any]], others: list[str]) -> list[str]:
    """Paired intervals, int8 model against int8 model on the same test examples.

    A peer has one order, which all of ours are compared with.
    """
    right = {line["point"]: _right(line) for line in lines}
    at = "the same size and seed; they prune at once" if others == list(PEERS) else "the same order, size and seed"
    text = [f"Against {' and '.join(others)} at {at} (int8, paired 95% interval, points):", ""]
    text += ["| method | against | order | kept | seed | difference | 95% interval | verdict |"]
    text += ["|---|---|---|--:|--:|--:|---|---|"]
    for point, ours in sorted(right.items()):
        method, rest = point.split("/", 1)
        if method in others or method not in COLOURS or ours is None:
            continue
        for other in others:
            order, kept, seed = rest.split("/")
            theirs = right.get(f"{other}/{'one_shot' if other in PEERS else order}/{kept}/{seed}")
            if theirs is None:
                continue
            found = paired_difference(_score(ours), _score(theirs))
            text.append(
                f"| {method} | {other} | {order} | {kept}% | {seed} | {100 * found.value:+.1f}"
                f" | {100 * found.low:+.1f} … {100 * found.high:+.1f} | {verdict((found.low, found.high))} |"
            )
    return text if len(text) > 4 else []


def _right(line: dict[str, Any], ending: str = "_int8") -> list[int] | None:
    """The right and wrong answers of the first variant whose id ends so, in data-set order."""
    variant = next((v for v in line["variants"] if v["id"].endswith(ending)), None)
    if variant is None:
        return None
    n = variant["metrics"]["accuracy"]["n"]
    return [int(bit) for bit in f"{int(variant['correct'], 16):0{n}b}"]


def _score(right: Sequence[float]) -> Score:
    return Score("accuracy", np.array(right, dtype=float)[:, None], MEAN)


def _plot(rows: list[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(11, 4.2), sharey=True)
    labels = ("times smaller (int8, int4 embedding)", "times faster (pruned fp32)")
    for axis, key, label in zip(axes, ("size_emb4", "speed_fp32"), labels):
        for method, colour in (COLOURS | PEERS).items():
            for order, style in STYLES.items():
                found = [r for r in rows if (r["method"], r["order"], r["seed"]) == (method, order, 0) and r[key]]
                if found:
                    found.sort(key=lambda r: r[key])
                    delta = "delta_emb4" if key == "size_emb4" else "delta_fp32"
                    xs, ys = [r[key] for r in found], [100 * r[delta] for r in found]
                    axis.plot(xs, ys, style, color=colour, label=f"{method} {order}".removesuffix(" -"))
        axis.axhline(0, color="#999999", lw=0.8)
        axis.axhline(-1, color="#999999", lw=0.8, ls=":")
        axis.set_xlabel(label)
        axis.grid(alpha=0.25)
    axes[0].set_ylabel("accuracy against dense, points")
    axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
