"""The figures of docs/jpqd.md: a block to each marker of the page, whose words around them are written by hand."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

from benchmarks.jpqd import order_table
from benchmarks.jpqd import summary as jpqd
from scripts.results.drawn import MINUS, ROOT, interval, load, signed, span, table

PAGE = ROOT / "docs" / "jpqd.md"
MARKED = re.compile(r"(<!-- made by scripts/results: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
AFTER, FAST, LATE = "fisher/after_prune", "fisher/joint, ranges fast", "fisher/last third"
LEVEL = "fisher/joint, recalibrated"


def page() -> str:
    """docs/jpqd.md with its blocks made anew. Raises KeyError for a marker of no block, ValueError where one is not on
    the page."""
    drawn: list[str] = []

    def block(match: re.Match[str]) -> str:
        drawn.append(match[2])
        return match[1] + "\n".join(BLOCKS[match[2]]()) + "\n" + match[3]

    text = MARKED.sub(block, PAGE.read_text(encoding="utf-8"))
    if missing := BLOCKS.keys() - set(drawn):
        raise ValueError(f"{PAGE.name} has no block {', '.join(sorted(missing))}")
    return text


def whole_runs() -> list[str]:
    every = load("jpqd.jsonl")
    kinds = {"all": every, "of Fisher alone": [line for line in every if line["point"].startswith("fisher/")]}
    lines = []
    for kind, chosen in kinds.items():
        *pairs, together = jpqd.orders(chosen)[4:]
        points = together.split(" | ")[-2].replace("-", MINUS).replace(" … ", " to ")
        lines.append([kind, str(len(pairs)), points])
    return table(["pairs", "count", "points"], lines)


def taught() -> list[str]:
    rows = [r for r in load("distil.json")["rows"] if r["of"] != r["name"]]
    return _named(
        ["taught by", "ahead of", "points"], [[f"`{r['name']}`", f"`{r['of']}`", interval(r["ahead"])] for r in rows]
    )


def setting() -> list[str]:
    found = load("joint_order.json")
    chosen = found["setting"]
    return [
        f"The encoder is cut to {100 * chosen['keep']:.0f}%, in a stage of {chosen['steps']} steps, of which gradual"
        f" pruning takes {chosen['warmup']}; calibration has {chosen['calibration']} reviews; scores are of"
        f" {len(found['dense']['labels']):,} test reviews."
    ]


def arms() -> list[str]:
    entries = sorted(order_table.pooled(load("joint_order.json")), key=lambda e: e["kl"])
    lines = [
        [
            f"`{e['arm']}`",
            str(e["seeds"]),
            _nats(e["kl_against"]) if "kl_against" in e else "",
            interval(e["accuracy_against"], 2) if "accuracy_against" in e else "",
            f"{e['seconds']:.0f} s",
        ]
        for e in entries
    ]
    heads = ["arm", "seeds", f"KL, against `{order_table.REFERENCE}`", "accuracy, points", "CPU time of the stage"]
    return table(heads, lines)


def seeds() -> list[str]:
    found = load("joint_order.json")
    first = {**found, "rows": [row for row in found["rows"] if row["seed"] < 2]}
    lines = []
    for arm in (AFTER, FAST):
        together, two = (_entry(result, arm) for result in (found, first))
        by_seed = [signed(1000 * gap) for gap in together["kl_by_seed"]]
        lines.append([f"`{arm}`", *by_seed, _nats(two["kl_against"]), _nats(together["kl_against"])])
    return table(["arm", "seed 0", "seed 1", "seed 2", "the first two", "all three"], lines)


def units() -> list[str]:
    found = load("joint_order.json")
    lines = [
        [f"two prunings, {what}", str(count), "", *(f"{100 * shares[k]:.0f}%" for k in ("heads", "channels"))]
        for what, count, shares in order_table.alike(found)
    ]
    for other, noise in found["noise"].items():
        what = {"quantizers": "quantizers or not", "reviews": "other reviews"}[other]
        shares = [f"{100 * noise['kept'][k]:.0f}%" for k in ("heads", "channels")]
        lines.append([f"scores of the dense model, {what}", "1", f"{noise['spearman']:.2f}", *shares])
    return table(["compared", "pairs", "Spearman of scores", "heads in common", "channels in common"], lines)


def ranges() -> list[str]:
    cuts = load("joint_order.json")["cuts"]
    moved, stale = "moved in the warm-up, middle eight of ten", "off by a tenth and more behind the cut"
    lines = []
    for arm, name in ((order_table.REFERENCE, order_table.REFERENCE), ("fisher/fast", FAST)):
        own = [cut for cut in cuts if cut["before"] == arm]
        for kind in ("weights", "activations"):
            ends = [cut["moved"][kind][p] for cut in own for p in ("p10", "p90")]
            off = span((100 * cut["stale"][kind]["over_10"] for cut in own), ".0f")
            lines.append([f"`{name}`", kind, f"{signed(min(ends))}% to {signed(max(ends))}%", f"{off}%"])
    return table(["arm", "ranges of", moved, stale], lines)


def begin() -> list[str]:
    found = load("joint_order.json")
    lines = []
    for arm in (order_table.REFERENCE, AFTER):
        entry = _entry(found, arm)
        lines.append([f"`{arm}`", *(f"{1000 * entry[key]:.0f}" for key in ("float_kl", "begin_kl"))])
    return table(["arm", "KL after the cut", "when quantizers act on the cut model"], lines)


def between() -> list[str]:
    found = load("joint_order.json")
    seeds_of = {entry["arm"]: entry["seeds"] for entry in order_table.pooled(found)}
    pairs = [
        (LEVEL, order_table.REFERENCE),
        (FAST, order_table.REFERENCE),
        (FAST, AFTER),
        ("fisher/after_prune, ranges fast", AFTER),
        (LATE, AFTER),
        ("curvature/last third", "curvature/after_prune"),
        ("curvature/after_prune", AFTER),
    ]
    lines = []
    for one, other in pairs:
        common = str(min(seeds_of[one], seeds_of[other]))
        lines.append([f"`{one}`", f"`{other}`", common, _nats(order_table.between(found, one, other))])
    return _named(["arm", "against", "seeds", "KL"], lines)


def _named(heads: list[str], lines: list[list[str]]) -> list[str]:
    """A table whose second column holds names as well."""
    return [line.replace("|---|--:|", "|---|---|", 1) for line in table(heads, lines)]


def _entry(result: dict[str, Any], arm: str) -> dict[str, Any]:
    return next(entry for entry in order_table.pooled(result) if entry["arm"] == arm)


def _nats(ends: Sequence[float]) -> str:
    """A difference in 1/1000 nat with its interval."""
    return interval([10 * end for end in ends])


BLOCKS: dict[str, Callable[[], list[str]]] = {
    block.__name__: block for block in (taught, whole_runs, setting, arms, seeds, units, ranges, begin, between)
}
