"""Accuracy, size and speed of JPQD against how much of the encoder is kept, method by method.

    .venv/bin/python -m benchmarks.jpqd.curve --json benchmarks/results/jpqd.jsonl
    .venv/bin/python -m benchmarks.jpqd.curve --json benchmarks/results/jpqd.jsonl --only 'fisher/*'
    .venv/bin/python -m benchmarks.jpqd.curve --json benchmarks/results/jpqd.jsonl --summary

A point is METHOD/ORDER/KEPT/SEED, for example fisher/joint/50/0, and becomes one line of
JSON; points that are in the file already are not run again, so the command can be stopped
and repeated. All points of a seed start from the same dense model, which is their teacher
and baseline, and train for the same number of steps. Choices (the best epoch, the masks)
see the validation split, the scores are those of the exported model on the test split.
`--data DIR` takes train.tsv, dev.tsv and test.tsv (text TAB label) instead of the packaged
film reviews. `--summary` only writes the table and the plot from the points there are.
Peers run in .venv-bench: `make setup-bench`, then benchmarks/jpqd/peers.py.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import shutil
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mptrain.data.load import Task

KEPT = (60, 50, 40, 33, 25)
SEEDS = (0, 1, 2)
METHODS = ("fisher", "magnitude", "movement")
VARIANT_FACTS = ("id", "metrics", "size_bytes", "params", "macs", "latency_ms")


def points() -> list[str]:
    """In the order of what they tell."""
    found = ["dense/-/100/0", "qat_int8/-/100/0"]
    found += [f"{method}/joint/{kept}/0" for kept in KEPT for method in ("fisher", "magnitude")]
    found += [f"movement/joint/{kept}/0" for kept in (60, 50, 33)]
    found += [f"{method}/sequential/{kept}/0" for kept in (50, 33) for method in METHODS]
    found += [p for seed in SEEDS[1:] for p in (f"dense/-/100/{seed}", *_seed(seed))]
    found += [f"fisher/one_shot/{kept}/0" for kept in (50, 33)]
    found += [f"curvature/one_shot/{kept}/0" for kept in (50, 33, 25, 15)]
    found += ["dense_longer/-/100/0"]
    found += [f"{m}/sequential/{kept}/0" for kept in (60, 40, 25) for m in ("fisher", "magnitude")]
    return found


def _seed(seed: int) -> list[str]:
    return [f"{method}/joint/{kept}/{seed}" for kept in (50, 33) for method in METHODS]


def recipe(point: str, data: Path | None, work: Path) -> dict[str, Any]:
    """The recipe of a point: two stages, dense and the method; one stage for dense itself."""
    method, order, kept, seed = point.split("/")
    train = {"epochs": 2, "lr": 1e-4, "batch_size": 32, "checkpoint_steps": 1000}
    stages: list[dict[str, Any]] = [{"id": "dense", "train": train}]
    jpqd: dict[str, Any] = {"id": "jpqd", "teacher": "dense", "train": train, "distill": {"weight": 0.9}}
    if method == "dense_longer":
        stages.append({"id": "longer", "train": train})
    elif method == "qat_int8":
        stages.append(jpqd | {"quantize": {"mode": "qat"}})
    elif method != "dense":
        prune: dict[str, Any] = {"method": method, "keep": {"encoder_params": int(kept) / 100}}
        if method != "curvature":  # which prunes at once alone
            prune["schedule"] = {"end": 0 if order == "one_shot" else 0.75}
        if method == "movement":
            prune |= {"score": "shared", "score_lr": 1e-2}
        start = "joint" if order == "joint" else "after_prune"
        stages.append(jpqd | {"prune": prune, "quantize": {"mode": "qat", "start": start}})
    source: dict[str, Any] = {"source": "packaged:film-reviews"}
    if data is not None:
        source = {"train": str(data / "train.tsv"), "validation": str(data / "dev.tsv"), "test": str(data / "test.tsv")}
    exports: list[dict[str, Any]] = [{"id": "dense", "format": "openvino", "of": ["dense"], "precision": ["fp32"]}]
    if method == "dense_longer":
        exports[0]["of"].append("longer")
    elif method != "dense":
        precision = ["fp32", "int8", "int8_emb4"]
        exports.append({"id": "jpqd", "format": "openvino", "of": ["jpqd"], "precision": precision})
    return {
        "schema": "mptrain/v1",
        "name": "bench",
        "seed": int(seed),
        "model": {"path": "packaged:minilm-l6", "task": "text-classification", "dropout": 0.0},
        "data": source | {"calibration": {"samples": 256, "batch_size": 32}},
        "stages": stages,
        "export": exports,
        "evaluate": {"latency": {"batch": [1], "length": [128], "threads": [1], "runs": 15}, "floor": False},
        "gates": {"parity": None, "agreement": None, "fused_attention": None},
        "output": {"dir": str(work / point.replace("/", "-"))},
    }


def run_point(point: str, data: Path | None, work: Path) -> dict[str, Any]:
    """Run a point and return its line. The dense model of the seed is trained once and copied."""
    from mptrain.recipe import file as recipe_file
    from mptrain.run import run

    begun = time.monotonic()
    dense = dense_run(point.split("/")[-1], data, work)
    described = recipe(point, data, work)
    report = run(recipe_file.validate(described, point), reuse=[dense])
    return line(point, report, Path(described["output"]["dir"]), begun)


def line(point: str, report: dict[str, Any], folder: Path, begun: float) -> dict[str, Any]:
    """What is kept of a run; its folder is removed."""
    found = {
        "point": point,
        "data": report["data"],
        "steps": report["training"],
        "variants": [{k: v[k] for k in VARIANT_FACTS} | correct(folder, v["id"]) for v in report["variants"]],
        "comparisons": report["comparisons"],
        "versions": report["versions"],
        "host": report["host"],
        "seconds": round(time.monotonic() - begun),
    }
    shutil.rmtree(folder)
    return found


def correct(folder: Path, variant: str) -> dict[str, str]:
    """Which test examples the variant got right, as hexadecimal bits: for paired intervals between points."""
    stats = json.loads((folder / "export" / f"{variant}.json").read_text())["scores"][0]["stats"]
    bits = "".join(str(int(row[0])) for row in stats)
    return {"correct": f"{int(bits, 2):x}"}


def dense_run(seed: str, data: Path | None, work: Path) -> Path:
    """The folder of the seed's dense model, trained if need be; all points of the seed take its stage over."""
    from mptrain.recipe import file as recipe_file
    from mptrain.run import run

    folder = work / f"dense-seed{seed}"
    described = recipe(f"dense/-/100/{seed}", data, work)
    described["output"]["dir"] = str(folder)
    run(recipe_file.validate(described, "dense"))
    return folder


def add_dense(parser: argparse.ArgumentParser) -> None:
    """What `dense_of` reads."""
    parser.add_argument("--dense", type=Path, help="folder of the trained dense model; default: train it")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/bench-jpqd"), help="folder for the dense run, and other models"
    )


def dense_of(options: argparse.Namespace) -> tuple[Path, Task]:
    """The folder of the dense model of the film reviews, seed 0, and its task."""
    from mptrain.data.load import load_data
    from mptrain.models.processor import load_processor
    from mptrain.recipe import file as recipe_file

    spec = recipe_file.validate(recipe("dense/-/100/0", None, options.work), "dense")
    folder = options.dense or dense_run("0", None, options.work) / "stages/dense/0-train/model"
    return folder, load_data(spec.data, spec.model.task, load_processor(spec.model), seed=spec.seed)


def read(path: Path) -> dict[str, dict[str, Any]]:
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
    return {line["point"]: line for line in lines}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="one line per point; appended to")
    parser.add_argument("--data", type=Path, help="folder with train.tsv, dev.tsv and test.tsv (text TAB label)")
    parser.add_argument("--only", default="*", help="pattern of points, e.g. 'fisher/joint/*'")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-jpqd"), help="folder for the runs")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no point after so many minutes")
    parser.add_argument("--summary", action="store_true", help="only write table and plot")
    options = parser.parse_args()
    begun = time.monotonic()
    options.json.parent.mkdir(parents=True, exist_ok=True)
    for point in points():
        if options.summary or point in read(options.json) or not fnmatch.fnmatch(point, options.only):
            continue
        if time.monotonic() - begun > 60 * options.minutes:
            break
        print(f"== {point}", file=sys.stderr, flush=True)
        found = run_point(point, options.data, options.work)
        with options.json.open("a") as file:
            file.write(json.dumps(found) + "\n")
    from benchmarks.jpqd.summary import summarize

    print(summarize(list(read(options.json).values()), options.json))
    return 0


if __name__ == "__main__":
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    sys.exit(main())
