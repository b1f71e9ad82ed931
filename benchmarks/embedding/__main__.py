r"""int8 of a sentence encoder: ours, and JPQD's, against sentence-transformers' own export, quality, size and time.

    mptrain recipe embed-minilm && mptrain recipe embed-jpqd
    python -m benchmarks.embedding --runs runs/embed-minilm runs/embed-jpqd \
        --json benchmarks/results/embedding.json    (--peer-python PATH: with requirements.txt beside this file)

All start from one folder, the packaged MiniLM. sentence-transformers calibrates on as many texts of the training split
as the first run does, by its own function with its defaults. All files are run in one way, by our runner with one
thread, and give hidden states that are pooled and scored in one way, so a difference is one of the files. A row:

    quality       NDCG@10 on the whole test split: the other reviews of the same film among all others
    fidelity      Spearman's correlation of a text's cosines to the other 511 of a part of the test split with those of
                  the fp32 file, mean over texts: what int8 changes, whether the search gains by it or loses
    over          {row: [difference of quality, low, high]}, paired, 95%: to fp32 and to sentence-transformers' int8;
                  over_fidelity: the same of fidelity, to sentence-transformers' int8
    size_bytes    of the .xml and .bin
    ms            median CPU time of a text of 32 tokens; files take turns, and the order rotates
    of_theirs     median over the rounds of that round's time over that of sentence-transformers' int8
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import subprocess
import sys
import tempfile
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import spearmanr

from benchmarks.kit.paired import markdown, mean_interval, turns, write
from mptrain.core.host import adds_int8_in_16_bits
from mptrain.data.load import load_data
from mptrain.data.sources import packaged
from mptrain.data.tasks.embedding import Embedding
from mptrain.export.openvino.runner import CompiledIr
from mptrain.measure.intervals import paired_difference
from mptrain.models.processor import load_processor
from mptrain.recipe import Recipe

FP32, THEIRS = "fp32", "sentence-transformers/int8"
LENGTH = 32
TEXTS = 512
POINTS = 0.01
"""of NDCG@10, that a JPQD point may lose"""


def cosines(runner: CompiledIr, task: Embedding) -> np.ndarray:
    """[TEXTS, TEXTS] of the first texts of the test split."""
    rows = []
    for start in range(0, TEXTS, 16):
        indices = range(start, start + 16)
        batch = task.without_targets(task.collate([task.test[i] for i in indices]))
        rows += [row[0] for row in task.read(runner(batch), batch, "test", list(indices))]
    vectors = np.stack(rows).astype(np.float64)
    return vectors @ vectors.T


def fidelity(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """[TEXTS]"""
    apart = ~np.eye(TEXTS, dtype=bool)
    return np.array([spearmanr(a[k], b[k]).statistic for a, b, k in zip(one, other, apart, strict=True)])


def theirs(python: str, task: Embedding, model: str, samples: int, folder: Path) -> tuple[Path, float]:
    """The .xml, and the seconds it took."""
    if (known := folder / "made.json").is_file():
        made = json.loads(known.read_text())
        return Path(made["xml"]), made["seconds"]
    texts = folder / "texts" / "texts.csv"
    texts.parent.mkdir(parents=True, exist_ok=True)
    with texts.open("w", newline="") as file:
        csv.writer(file).writerows([["text"], *([text] for text in task.texts["train"]["text"][:samples])])
    script = str(Path(__file__).parent / "peer.py")
    command = [python, script, str(packaged.fetch(model)), str(folder / "out"), str(texts), str(samples)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(done.stderr[-3000:])
    made = json.loads(done.stdout.splitlines()[-1])
    known.write_text(json.dumps(made))
    return Path(made["xml"]), made["seconds"]


def compared(runs: list[Path], python: str, rounds: int, folder: Path) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    reports = [json.loads((run / "report.json").read_text()) for run in runs]
    recipe = Recipe.model_validate(reports[0]["recipe"])
    processor = load_processor(recipe.model)
    whole = recipe.data.model_copy(update={"max_samples": None})
    task = load_data(whole, recipe.model.task, processor, seed=recipe.seed)
    assert isinstance(task, Embedding)
    files: dict[str, Path] = {}
    for run, report in zip(runs, reports, strict=True):
        for variant in report["variants"]:
            if variant["id"] == report["baseline"]:
                files.setdefault(FP32, run / variant["path"])
            else:
                files[f"{report['name']}/{variant['id']}"] = run / variant["path"]
    with ExitStack() as stack:
        files[THEIRS], seconds = theirs(python, task, recipe.model.path, recipe.data.calibration.samples, folder)
        runners = {name: stack.enter_context(closing(CompiledIr(path, 1))) for name, path in files.items()}
        sizes = {n: sum(p.with_suffix(end).stat().st_size for end in (".xml", ".bin")) for n, p in files.items()}
        scores = {name: task.evaluate(runner, "test")[0] for name, runner in runners.items()}
        near = {name: cosines(runner, task) for name, runner in runners.items()}
        batch = task.without_targets(task.example(1, LENGTH))
        times = turns({name: partial(runner, batch) for name, runner in runners.items()}, rounds)
    rows = []
    like = {name: fidelity(near[name], near[FP32]) for name in files}
    for name in files:
        against = [other for other in (FP32, THEIRS) if other != name]
        apart = {other: paired_difference(scores[name], scores[other]) for other in against}
        rows.append(
            {
                "name": name,
                "quality": scores[name].value,
                "fidelity": float(like[name].mean()),
                "over_fidelity": mean_interval(like[name] - like[THEIRS]),
                "over": {other: [d.value, d.low, d.high] for other, d in apart.items()},
                "size_bytes": sizes[name],
                "ms": 1e3 * statistics.median(times[name]),
                "of_theirs": statistics.median(a / b for a, b in zip(times[name], times[THEIRS], strict=True)),
            }
        )
    return rows, {"examples": scores[FP32].n, "metric": scores[FP32].name, "their_seconds": seconds, "rounds": rounds}


def bars(rows: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    known = {row["name"]: row for row in rows}
    peer, own = known[THEIRS], [row for name, row in known.items() if name not in (FP32, THEIRS)]
    least = [row for row in own if row["size_bytes"] <= 1.01 * peer["size_bytes"]]
    good = [row for row in least if row["over"][THEIRS][2] >= 0]
    quick = [row for row in own if row["of_theirs"] <= 0.5 and row["over"][FP32][0] >= -POINTS]
    return [
        ("at no larger size (1%), not behind sentence-transformers' int8 in NDCG@10", bool(good)),
        ("at no larger size (1%), not behind it in fidelity to fp32", any(r["over_fidelity"][2] >= 0 for r in least)),
        ("a point twice as fast as it, within one point of fp32", bool(quick)),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, nargs="+", required=True, help="finished runs of one model and data")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--peer-python", default=sys.executable, help="a Python with requirements.txt beside this file")
    parser.add_argument("--folder", type=Path, help="where sentence-transformers' files go, and stay")
    parser.add_argument("--rounds", type=int, default=101)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        rows, more = compared(options.runs, options.peer_python, options.rounds, folder)
    told = []
    for row in rows:
        mb = row["size_bytes"] / 1e6
        apart = {
            f"to {o}": f"{100 * v:+.2f} ({100 * a:+.2f} to {100 * b:+.2f})" for o, (v, a, b) in row["over"].items()
        }
        told.append({**row, "points": 100 * row["quality"], "like": f"{row['fidelity']:.4f}", "mb": mb, **apart})
    columns = {
        "name": "row", "points": "NDCG@10, points", f"to {FP32}": "to fp32", f"to {THEIRS}": "to theirs",
        "like": "as fp32 orders", "mb": "MB", "ms": "ms", "of_theirs": "of their time",
    }  # fmt: skip
    table = markdown(told, columns)
    if adds_int8_in_16_bits():
        table += "\n\nThis CPU has neither VNNI nor AMX: int8 has no fast instructions here, and 8-bit weights overflow"
        table += " its 16-bit sums; runs with `reduce_range` have 7-bit weights."
    write(options.json, rows, bars(rows), table, plotted=None, sixteen_bit_sums=adds_int8_in_16_bits(), **more)


if __name__ == "__main__":
    main()
