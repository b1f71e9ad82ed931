"""Intervals and tables of order.py's result: paired over test reviews, pooled over seeds."""

from __future__ import annotations

import base64
from collections.abc import Iterable
from itertools import combinations
from typing import Any

import numpy as np

from benchmarks.jpqd.order_facts import divergences, overlap
from benchmarks.kit.paired import mean_interval

REFERENCE = "fisher/joint"


def setting(steps: int) -> dict[str, int]:
    """Of a stage: its steps, those of a gradual warm-up (as many of them as in the recipe jpqd-bert), and where the
    last third begins."""
    return {"steps": steps, "warmup": round(0.375 * steps), "late": round(2 / 3 * steps)}


def packed(margins: np.ndarray) -> str:
    """float16 in base64: a number to each test review says what is right, how sure, and how far from the teacher."""
    return base64.b64encode(margins.astype("<f2").tobytes()).decode()


def unpacked(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), "<f2").astype(np.float64)


def pooled(result: dict[str, Any]) -> list[dict[str, Any]]:
    """An entry to each arm. accuracy, kl: means over seeds. against: the paired difference to the reference on the
    seeds that both have, [mean, low, high] in parts (accuracy) and in nats (kl), over reviews, of means over seeds;
    by_seed: of accuracy. seconds: mean CPU time of one run, all of it."""
    labels = np.array([int(c) for c in result["dense"]["labels"]])
    teacher = unpacked(result["dense"]["margins"])
    found: dict[str, dict[int, tuple[np.ndarray, np.ndarray]]] = {}
    for row in result["rows"]:
        margins = unpacked(row["margins"])
        right = ((margins > 0) == labels).astype(float)
        found.setdefault(row["arm"], {})[row["seed"]] = right, divergences(teacher, margins)
    entries = []
    for arm, seeds in found.items():
        common = sorted(seeds.keys() & found.get(REFERENCE, {}).keys())
        own = [r for r in result["rows"] if r["arm"] == arm]
        entry: dict[str, Any] = {"arm": arm, "seeds": len(seeds), "n": len(labels)}
        for i, name in enumerate(("accuracy", "kl")):
            entry[name] = float(np.mean([seeds[s][i].mean() for s in seeds]))
            if arm != REFERENCE and common:
                gaps = np.stack([seeds[s][i] - found[REFERENCE][s][i] for s in common])
                entry[f"{name}_against"] = mean_interval(gaps.mean(0))
                entry[f"{name}_by_seed"] = gaps.mean(1).tolist()
        for name in ("seconds", "begin_kl", "float_kl", "clipped", "gradient_of_ranges"):
            entry[name] = float(np.mean([r[name] for r in own]))
        entries.append(entry)
    return entries


def between(result: dict[str, Any], one: str, other: str, which: str = "kl") -> list[float]:
    """[mean, low, high] of one arm's minus another's, on the seeds that both have; nan where there is none."""
    labels = np.array([int(c) for c in result["dense"]["labels"]])
    teacher = unpacked(result["dense"]["margins"])
    rows = {r["name"]: unpacked(r["margins"]) for r in result["rows"]}
    seeds = sorted({r["seed"] for r in result["rows"] if {f"{one}/{r['seed']}", f"{other}/{r['seed']}"} <= rows.keys()})
    if not seeds:
        return [float("nan")] * 3

    def values(name: str) -> np.ndarray:
        return divergences(teacher, rows[name]) if which == "kl" else ((rows[name] > 0) == labels).astype(float)

    gaps = [values(f"{one}/{s}") - values(f"{other}/{s}") for s in seeds]
    return mean_interval(np.mean(gaps, axis=0))


def alike(result: dict[str, Any]) -> list[tuple[str, int, dict[str, float]]]:
    """Which units gradual Fisher pruning kept, in common: with quantizers and without, by the same batches; and with
    other batches, without quantizers. (what, pairs, means of heads and channels)"""
    cuts = {(c["before"], c["seed"]): c["kept"] for c in result["cuts"]}
    seeds = sorted({seed for _, seed in cuts})
    same = [(("fisher/float", s), ("fisher/joint", s)) for s in seeds]
    others = [(("fisher/float", a), ("fisher/float", b)) for a, b in combinations(seeds, 2)]
    groups = {"quantizers in the warm-up or not, same batches": same, "other batches, no quantizers": others}
    found = []
    for what, pairs in groups.items():
        have = [overlap(cuts[a], cuts[b]) for a, b in pairs if a in cuts and b in cuts]
        if have:
            found.append((what, len(have), {k: float(np.mean([h[k] for h in have])) for k in have[0]}))
    return found


def stale(result: dict[str, Any]) -> list[list[str]]:
    """Cells: what came through a cut against what calibration would give after it; and what training moved."""
    lines = []
    for cut in result["cuts"]:
        for what in ("moved", "stale"):
            for kind, off in cut.get(what, {}).items():
                text = {"moved": "end of warm-up against its start", "stale": "after the cut against fresh"}[what]
                if what == "moved" and cut["before"].startswith("curvature"):
                    continue  # nothing trained
                cells = [cut["name"], kind, text, *(f"{off[p]:+.1f}%" for p in ("p10", "p50", "p90"))]
                lines.append([*cells, f"{100 * off['over_10']:.0f}%"])
    return lines


def _interval(ends: Iterable[float], scale: float, digits: int) -> str:
    value, low, high = (f"{scale * end:+.{digits}f}" for end in ends)
    return f"{value} ({low} … {high})"


def _rows(heads: list[str], lines: Iterable[list[str]]) -> list[str]:
    return [
        f"| {' | '.join(heads)} |",
        f"|{'|'.join(['---', *['--:'] * (len(heads) - 1)])}|",
        *(f"| {' | '.join(line)} |" for line in lines),
    ]


def markdown(result: dict[str, Any]) -> str:
    entries = sorted(pooled(result), key=lambda e: e["kl"])
    labels = np.array([int(c) for c in result["dense"]["labels"]])
    dense = float(((unpacked(result["dense"]["margins"]) > 0) == labels).mean())
    lines = []
    for e in entries:
        cells = [e["arm"], str(e["seeds"]), f"{100 * e['accuracy']:.1f}%"]
        cells.append(_interval(e["accuracy_against"], 100, 2) if "accuracy_against" in e else "")
        cells.append(f"{1000 * e['kl']:.1f}")
        cells.append(_interval(e["kl_against"], 1000, 1) if "kl_against" in e else "")
        cells += [f"{1000 * e['begin_kl']:.0f}", f"{e['seconds']:.0f}"]
        lines.append(cells)
    chosen = result["setting"]
    text = [
        f"Dense {100 * dense:.1f}% on {len(labels)} test reviews; {100 * chosen['keep']:.0f}% of the encoder kept,"
        f" {chosen['steps']} steps, of which {chosen['warmup']} warm-up where pruning is gradual; last third: from"
        f" step {chosen['late']} on. Differences to `{REFERENCE}`, paired over reviews, 95%: accuracy in points, KL"
        " from the teacher in 1/1000 nat (less is better). At first: the same KL on 512 validation reviews when the"
        " quantizers begin to act on the cut model. Seconds: CPU time of the whole stage.",
        "",
        *_rows(["arm", "seeds", "accuracy", "against", "KL", "against", "at first", "seconds"], lines),
        "",
        "Units that two gradual Fisher prunings keep in common:",
        "",
        *_rows(
            ["two runs with", "pairs", "heads", "channels"],
            ([w, str(n), *(f"{100 * v[k]:.0f}%" for k in ("heads", "channels"))] for w, n, v in alike(result)),
        ),
        "",
        "Ranges, 10th, 50th and 90th percentile of how far off, and the share off by more than a tenth:",
        "",
        *_rows(["cut", "of", "what", "10%", "50%", "90%", "over a tenth"], stale(result)),
    ]
    if "noise" in result:
        noise = [
            [what, f"{v['spearman']:.3f}", *(f"{100 * v['kept'][k]:.0f}%" for k in ("heads", "channels"))]
            for what, v in result["noise"].items()
        ]
        text += ["", "Fisher scores of the dense model, two times, with other:", ""]
        text += _rows(["other", "Spearman", "heads in common", "channels in common"], noise)
    return "\n".join(text)
