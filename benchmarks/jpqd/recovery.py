"""What training gives back after pruning at once, method by method.

    .venv-bench/bin/python -m benchmarks.jpqd.recovery --json benchmarks/results/recovery.json --peers
    python -m benchmarks.jpqd.recovery --json benchmarks/results/recovery.json

The dense MiniLM of the film reviews (2 epochs; one to a seed, trained here unless --dense names them) is cut by each
method from the same 1,024 training reviews (one_shot.py), and the small model learns from the dense one: distillation
of logits and hidden states, in float, from the same reviews, for all methods one epoch (278 steps of 32 reviews). Each
method and size has the learning rate, of two, that is best for it on the validation split with the first seed; `test`
judges it. A row has the accuracy of the fp32 export in the mean of the seeds, `against_dense` and `curvature_ahead` as
[value, low, high], paired over the reviews; the rows without a size are the mean of 25 and 15%. `--peers` prunes with
torch-pruning and ModelOpt's gradnas (`make setup-bench`) and leaves the models in --work, which the second command
trains like the others. Arms that are in the file are kept, so both can be stopped and repeated.
"""

from __future__ import annotations

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.jpqd.curve import dense_run
from benchmarks.jpqd.distil import described, files, mean_of, places, ran
from benchmarks.jpqd.embedding_rank import percent
from benchmarks.jpqd.one_shot import PEERS, pruned, pruned_by_peer, scored
from mptrain.core.disk import read_json, write_json
from mptrain.core.host import host
from mptrain.data.load import Task, load_data
from mptrain.data.tasks.metrics import Score
from mptrain.flow.identity import versions
from mptrain.measure.intervals import paired_difference
from mptrain.models import artifact
from mptrain.models.processor import load_processor
from mptrain.recipe import file as recipe_file

Row = dict[str, Any]
OURS = "curvature"
METHODS = (OURS, "fisher", *PEERS)
SMALLEST = (0.25, 0.15)
KEPT = (0.5, 0.33, *SMALLEST)
EPOCHS = 1
RATES = (1e-4, 3e-5)
SEEDS = (42, 43, 44)
Arm = tuple[str, float, float, int]
"""method, kept, rate, seed"""


def arms(made: dict[str, Row]) -> Iterator[Arm]:
    """The first seed with all rates, then the others with the chosen ones: `made` has to grow with what is yielded."""
    first, *others = SEEDS
    for kept, method, lr in itertools.product(KEPT, METHODS, RATES):
        yield method, kept, lr, first
    for seed, kept, method in itertools.product(others, KEPT, METHODS):
        yield method, kept, chosen_rate(made, method, kept), seed


def chosen_rate(made: dict[str, Row], method: str, kept: float) -> float:
    return max(RATES, key=lambda lr: made[name_of(method, kept, lr, SEEDS[0])]["validation"])


def name_of(method: str, kept: float, rate: float, seed: int) -> str:
    return f"{method}/{kept:g}/{EPOCHS}/{rate:g}/{seed}"


def recipe(arm: Arm, dense: Path, start: Path, data: Path, folder: Path) -> Row:
    """Of an arm: one stage, from the pruned model in `start` on."""
    _, _, rate, seed = arm
    stage = {
        "id": "taught",
        "teacher": str(dense),
        "train": {"epochs": EPOCHS, "lr": rate, "batch_size": 32},
        "distill": {"weight": 0.9, "hidden": 3.0},
    }
    return described(start, places(data, "train"), stage, seed, folder)


def small(method: str, kept: float, dense: Path, seed: int, task: Task | None, work: Path) -> Path:
    """The folder of the model that a method leaves of the dense one, made here where `task` is given."""
    folder = work / f"{method}-{kept:g}-{seed}"
    if not folder.is_dir():
        if task is None:
            raise SystemExit(f"{folder} is missing: run .venv-bench/bin/python -m {__spec__.name} --peers first.")
        left = (
            pruned_by_peer(dense, method, kept, task)
            if method in PEERS
            else pruned(artifact.load(dense), method, kept, task)
        )
        artifact.save(left.eval(), folder, task.processor)
    return folder


def summary(made: dict[str, Row], dense: dict[str, str]) -> list[Row]:
    """A row to each method and size that all seeds have; then the mean of the smallest sizes."""
    if any(str(seed) not in dense for seed in SEEDS):
        return []
    base = mean_of([dense[str(seed)] for seed in SEEDS])
    found = []
    for of in (*((kept,) for kept in KEPT), SMALLEST):
        done = {m: runs for m in METHODS if (runs := [_runs(made, m, kept) for kept in of]) and all(runs)}
        scores = {m: mean_of([one["correct"] for one in itertools.chain(*runs)]) for m, runs in done.items()}
        for method, score in scores.items():
            row: Row = {"method": method, "keep": of[0] if len(of) == 1 else None}
            if row["keep"]:
                row["lr"] = chosen_rate(made, method, row["keep"])
            row |= {"test": score.value, "n": score.n, "seeds": len(SEEDS), "steps": done[method][0][0]["steps"]}
            row["against_dense"] = _change(score, base)
            if method != OURS and OURS in scores:
                row["curvature_ahead"] = _change(scores[OURS], score)
            found.append(row)
    return found


def _runs(made: dict[str, Row], method: str, kept: float) -> list[Row]:
    """Of all seeds at the chosen rate; none while one is missing."""
    if any(name_of(method, kept, lr, SEEDS[0]) not in made for lr in RATES):
        return []
    rate = chosen_rate(made, method, kept)
    names = [name_of(method, kept, rate, seed) for seed in SEEDS]
    return [made[name] for name in names] if all(name in made for name in names) else []


def _change(a: Score, b: Score) -> list[float]:
    found = paired_difference(a, b)
    return [found.value, found.low, found.high]


def table(result: Row) -> str:
    lines = [
        "| kept | steps | method | rate | test | against dense | curvature is ahead by |",
        "|--:|--:|---|--:|--:|---|---|",
    ]
    for r in result["rows"]:
        kept = "mean" if r["keep"] is None else f"{100 * r['keep']:.0f}%"
        against, ahead = (percent(r[key]) if key in r else "" for key in ("against_dense", "curvature_ahead"))
        rate = f"{r['lr']:.0e}" if "lr" in r else ""
        lines.append(
            f"| {kept} | {r['steps']} | {r['method']} | {rate} | {100 * r['test']:.1f}% | {against} | {ahead} |"
        )
    n = result["rows"][0]["n"] if result["rows"] else 0
    return "\n".join([*lines, "", f"n = {n:,}, {len(SEEDS)} seeds; {result['host']['cpu']}.", ""])


def right(dense: Path, task: Task) -> str:
    """Which test reviews the dense model gets right."""
    return "".join(str(int(row[0])) for row in scored(artifact.load(dense), task, "test").stats)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--dense", type=Path, nargs=len(SEEDS), help="folders of the trained dense models, by seed")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-recovery"), help="folder for models and runs")
    parser.add_argument("--peers", action="store_true", help="only prune with the peers")
    options = parser.parse_args()
    work = options.work.absolute()
    dense = options.dense or [dense_run(str(s), None, work) / "stages/dense/0-train/model" for s in SEEDS]
    dense = dict(zip(SEEDS, (folder.absolute() for folder in dense)))
    data = work / "splits"
    if not data.is_dir():
        files(data)
    if options.peers:
        for seed in SEEDS:
            task = _task(dense[seed], data)
            for kept in KEPT:
                for peer in PEERS:
                    print(small(peer, kept, dense[seed], seed, task, work), flush=True)
        return 0
    result: Row = read_json(options.json) if options.json.is_file() else {"arms": {}, "dense": {}}
    result |= {"host": host(), "versions": versions()}
    for arm in arms(result["arms"]):
        method, kept, _, seed = arm
        if (name := name_of(*arm)) in result["arms"]:
            continue
        if str(seed) not in result["dense"]:
            result["dense"][str(seed)] = right(dense[seed], _task(dense[seed], data))
        start = small(method, kept, dense[seed], seed, None if method in PEERS else _task(dense[seed], data), work)
        report, correct = ran(recipe(arm, dense[seed], start, data, work / "runs" / name.replace("/", "-")))
        scores = [row["eval/accuracy"] for row in report["history"] if "eval/accuracy" in row]
        steps = report["training"][-1]["steps"]
        result["arms"][name] = {"correct": correct, "validation": max(scores), "steps": steps}
        print(name, max(scores), flush=True)
        result["rows"] = summary(result["arms"], result["dense"])
        write_json(options.json, result)
    result["rows"] = summary(result["arms"], result["dense"])
    write_json(options.json, result)
    options.json.with_suffix(".md").write_text(table(result), encoding="utf-8")
    print(table(result))
    return 0


def _task(dense: Path, data: Path) -> Task:
    stage = {"id": "taught", "train": {"epochs": 1, "lr": 1e-4}}
    spec = recipe_file.validate(described(dense, places(data, "train"), stage, 0, data), "bench")
    return load_data(spec.data, spec.model.task, load_processor(spec.model), seed=spec.seed)


if __name__ == "__main__":
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    sys.exit(main())
