r"""SmolLM2-135M pruned, in int4 and trained through its rounding, against int4 alone: size, perplexity, token time.

    python -m benchmarks.llm.prune --text wikitext2_valid.txt --test wikitext2_test.txt \
        --json benchmarks/results/llm_prune.json    (--folder runs/llm-prune: where runs and files stay)

Each row is a recipe that `mptrain.run` runs, in a process of its own, and an OpenVINO file with its cache; rows that
are there are not made again, and a row that was stopped goes on. STRUCTURE/WEIGHTS:

    whole         all of the blocks; pruned-K: K percent of their parameters by curvature (heads with their keys and
                  values, FFN channels in 64s); shallow-K: the same share as whole layers, those left out that change
                  their input least (block influence, Men et al. 2024, arXiv 2403.03853)
    fp32          as it comes; gptq: int4 in symmetric blocks of 64 (GPTQ), embedding int8, nothing is trained;
                  trained: from the integers of GPTQ on, trained through the rounding, with the whole float model as
                  teacher

`--text` is trained and calibrated on but for its last 12%, by which settings were chosen; `--test` is only scored, by
the file (benchmarks.llm_openvino: the first 12,160 tokens, windows of 256, stride 128). All rows that train have the
same steps, tokens and rate.

    size_bytes    of the .xml and .bin together; kept: of the parameters of the blocks, as the file has them
    ppl, over     perplexity; difference of the mean loss from whole/gptq in nats a token [mean, low, high], paired over
                  runs of 128 tokens, 95%
    tpot_ms       a token after the first, a prompt of 64: medians of rounds in which all files take turns
    cpu_minutes   of the process that made a row that trains: GPTQ, training, export and checks; not the pruning, which
                  the row before it did
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.kit.paired import markdown, write
from benchmarks.llm_openvino import CACHE, MODEL, losses, opened, paired, time_all

LENGTH, SAMPLES, BATCH = 256, 64, 2
STEPS, LR = 240, 3e-4
HELD = 0.12
BASE = "whole/gptq"
ROWS = [
    "whole/fp32", BASE, "whole/trained", "pruned-80/gptq", "pruned-80/trained", "pruned-70/gptq", "pruned-70/trained",
    "shallow-70/gptq", "shallow-70/trained",
]  # fmt: skip
INT4 = {"mode": "weight_only", "method": "gptq", "bits": 4, "block_size": 64}


def recipe(row: str, folder: Path, windows: int) -> dict[str, Any]:
    """The recipe of a row. windows: of LENGTH tokens in the training text."""
    structure, weights = row.split("/")
    stages: list[dict[str, Any]] = []
    kept = int(structure.rpartition("-")[2]) / 100 if "-" in structure else 1.0
    if structure.startswith("pruned"):
        keep = {"method": "curvature", "keep": {"encoder_params": kept}, "round_ffn": 64, "min_ffn": 64}
        stages.append({"id": "small", "from": "model", "prune": keep})
    if weights == "gptq":
        stages.append({"id": "int4", "quantize": INT4})
    if weights == "trained":
        train = {"epochs": STEPS * BATCH / windows, "lr": LR, "batch_size": BATCH, "checkpoint_steps": 25}
        stages.append(
            {
                "id": "int4",
                "teacher": MODEL,
                "train": {**train, "log_steps": 5, "eval_batch_size": 2},
                "distill": {"weight": 0.7, "temperature": 1.0},
                "quantize": {**INT4, "finetune": {}},
            }
        )
    if weights == "fp32":  # a recipe has a stage
        stages.append({"id": "int4", "quantize": {"mode": "weight_only", "method": "rtn"}})
    of, precision = ("model", "fp32") if weights == "fp32" else ("int4", "compressed")
    return {
        "schema": "mptrain/v1",
        "name": row.replace("/", "-"),
        "model": {
            "path": str(folder / structure / "model") if structure.startswith("shallow") else MODEL,
            "task": "causal-lm",
        },
        "data": {
            "train": str(folder / "train.txt"),
            "validation": str(folder / "held.txt"),
            "test": str(folder / "held.txt"),
            "max_length": LENGTH,
            "stride": LENGTH // 2,
            "calibration": {"samples": SAMPLES, "batch_size": BATCH},
        },
        "stages": stages,
        "export": [{"id": "ov", "format": "openvino", "of": [of], "precision": [precision], "cache": CACHE}],
        "evaluate": {"latency": {"batch": [1], "length": [64], "threads": [1], "runs": 1}, "batch_size": 2},
        "gates": {"parity": 1e-3},
        "output": {"dir": str(folder / "runs" / row.replace("/", "-"))},
    }


def make(row: str, folder: Path) -> None:
    """In a process of its own: the run of a row, or what is left of it."""
    from mptrain.recipe.file import read
    from mptrain.run import run

    structure = row.split("/")[0]
    if structure.startswith("shallow") and not (folder / structure / "model").is_dir():
        leave_out_layers(int(structure.rpartition("-")[2]) / 100, folder / "train.txt", folder / structure / "model")
    path = folder / f"{row.replace('/', '-')}.json"
    path.write_text(json.dumps(recipe(row, folder, json.loads((folder / "windows.json").read_text()))))
    twins = [folder / "runs" / other.replace("/", "-") for other in ROWS if other.split("/")[0] == structure]
    run(read(path).recipe, reuse=[twin for twin in twins if twin.name != row.replace("/", "-") and twin.is_dir()])


def leave_out_layers(kept: float, text: Path, out: Path) -> None:
    """The model without the layers of the least influence: 1 - cos of a token's state before and after, on average."""
    from mptrain.models.load import load_model
    from mptrain.models.processor import load_processor
    from mptrain.recipe import Model

    spec = Model(path=MODEL, task="causal-lm")
    model, tokenizer = load_model(spec, None, seed=0).eval(), load_processor(spec)
    ids = torch.tensor(tokenizer(text.read_text(encoding="utf-8"))["input_ids"])
    rows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    rows = rows[:: len(rows) // SAMPLES][:SAMPLES]
    count = len(model.model.layers)
    influence = torch.zeros(count, dtype=torch.float64)
    with torch.no_grad():
        for part in rows.split(BATCH):
            states = model.model(part, output_hidden_states=True, use_cache=False).hidden_states
            # the last of them is behind the final norm, which turns it
            cosines = [torch.cosine_similarity(a, b, dim=-1).mean() for a, b in pairwise(states)]
            influence += 1 - torch.stack(cosines).double()
    order = influence[:-1].argsort()  # the last layer stays: its state is not among them
    gone = set(order[: count - round(kept * count)].tolist())
    model.model.layers = torch.nn.ModuleList(m for i, m in enumerate(model.model.layers) if i not in gone)
    model.config.num_hidden_layers = len(model.model.layers)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    (out.parent / "layers.json").write_text(json.dumps({"without": sorted(gone), "influence": influence.tolist()}))


def exported(row: str, folder: Path) -> Path:
    (xml,) = (folder / "runs" / row.replace("/", "-") / "export").glob("*/openvino_model.xml")
    return xml


def facts(row: str, folder: Path) -> dict[str, Any]:
    """Of a finished run: size, share of the blocks, tokens, what the training log says at its end."""
    xml = exported(row, folder)
    run = folder / "runs" / row.replace("/", "-")
    report = json.loads((run / "report.json").read_text())
    found: dict[str, Any] = {
        "size_bytes": sum(path.stat().st_size for path in xml.parent.glob("openvino_model.*")),
        "kept": blocks_of(run, row) / WHOLE,
        "held_ppl": report["variants"][-1]["metrics"]["perplexity"]["value"],
    }
    if row.endswith("/trained"):
        logs = [entry for entry in report["history"] if "loss" in entry]
        moved = [entry["compress/moved"] for entry in report["history"] if "compress/moved" in entry]
        found |= {"trained_tokens": STEPS * BATCH * LENGTH, "moved": moved[-1]}
        found["losses"] = [round(entry["loss"], 4) for entry in logs]
    return found


WHOLE = 30 * (576 * (576 + 192 + 192 + 576) + 3 * 576 * 1536)
"""weights of the blocks of SmolLM2-135M"""


def blocks_of(run: Path, row: str) -> int:
    """Weights of the attention and FFN layers."""
    import mptrain

    if row.startswith("whole"):
        return WHOLE
    model = mptrain.load(next((run / "stages" / "int4").glob("*/model")))
    return sum(p.numel() for name, p in model.named_parameters() if ".layers." in name and p.dim() == 2)


def bars(rows: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    """Said before anything was measured."""

    def below(row: str, other: str) -> bool:
        return rows[row]["against"][other][2] < 0

    found = []
    for share in (80, 70):
        row = f"pruned-{share}/trained"
        if row in rows:
            found.append((f"{row}: perplexity not above {BASE}", rows[row]["over"][1] <= 0))
            found.append((f"{row}: below the same without training", below(row, f"pruned-{share}/gptq")))
        if row in rows and f"shallow-{share}/trained" in rows:
            found.append((f"{row}: below the same size by depth alone", below(row, f"shallow-{share}/trained")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--text", type=Path, help="to train and calibrate on")
    parser.add_argument("--test", type=Path, help="to score")
    parser.add_argument("--folder", type=Path, default=Path("runs/llm-prune"))
    parser.add_argument("--only", nargs="*", choices=ROWS)
    parser.add_argument("--make", choices=ROWS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.folder = options.folder.resolve()
    if options.make:
        make(options.make, options.folder)
        return
    if options.text is None or options.test is None:
        parser.error("--text and --test are needed")
    compared(options)


def prepared(options: argparse.Namespace) -> list[int]:
    """Text files for the recipes; the token ids of the test text."""
    from mptrain.models.processor import load_processor
    from mptrain.recipe import Model

    folder = options.folder
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = load_processor(Model(path=MODEL, task="causal-lm"))
    lines = options.text.read_text(encoding="utf-8").splitlines(keepends=True)
    cut = int(len(lines) * (1 - HELD))
    train, held = "".join(lines[:cut]), "".join(lines[cut:])[:20000]
    for name, text in (("train.txt", train), ("held.txt", held)):
        if not (folder / name).is_file():
            (folder / name).write_text(text, encoding="utf-8")
    windows = -(-len(tokenizer(train)["input_ids"]) // LENGTH)
    (folder / "windows.json").write_text(json.dumps(windows))
    return tokenizer(options.test.read_text(encoding="utf-8"))["input_ids"]


def made(row: str, folder: Path) -> float:
    """Makes a row; the CPU minutes that it took, of stopped attempts too. Raises RuntimeError where it failed."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    one = dict.fromkeys(("OMP_NUM_THREADS", "TBB_NUM_THREADS"), "1")
    command = [sys.executable, "-m", "benchmarks.llm.prune", "--make", row, "--folder", str(folder)]
    taken = folder / f"{row.replace('/', '-')}.minutes"
    try:
        with (folder / f"{row.replace('/', '-')}.log").open("a") as log:
            done = subprocess.run(command, stdout=log, stderr=log, env={**os.environ, **one})
    finally:
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        minutes = (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) / 60
        minutes += float(taken.read_text()) if taken.is_file() else 0.0
        taken.write_text(str(minutes))
    if done.returncode:
        raise RuntimeError(f"{row} ended with status {done.returncode}; see {log.name}")
    return minutes


def compared(options: argparse.Namespace) -> None:
    folder, stream = options.folder, prepared(options)
    kept = folder / "rows.json"
    rows: dict[str, dict[str, Any]] = json.loads(kept.read_text()) if kept.is_file() else {}
    for row in options.only or ROWS:
        if row not in rows:
            minutes = made(row, folder)
            spent = {"cpu_minutes": minutes} if row.endswith("/trained") else {}
            rows[row] = {"name": row, **spent, **facts(row, folder)}
            kept.write_text(json.dumps(rows))
        if "ppl" not in rows[row]:
            with closing(opened(exported(row, folder))) as runner:
                found = losses(runner, stream)
            np.save(folder / f"{row.replace('/', '-')}.npy", found)
            rows[row]["ppl"] = float(np.exp(found.mean()))
            kept.write_text(json.dumps(rows))
        print(json.dumps(rows[row]), flush=True)
    if options.json is None:
        return
    rows = {row: rows[row] for row in ROWS if row in rows}
    scored = {row: np.load(folder / f"{row.replace('/', '-')}.npy") for row in rows}
    times = time_all({row: exported(row, folder) for row in rows}, np.array([stream[:64]], dtype=np.int64))
    for name, row in rows.items():
        row["against"] = {other: paired(scored[name], found) for other, found in scored.items() if other != name}
        row |= times[name] | {"over": row["against"].get(BASE)}
    columns = {
        "name": "row", "kept_percent": "% of the blocks", "size_mb": "MB", "ppl": "perplexity", "over_percent":
        "over whole/gptq, %", "tpot_ms": "per token, ms", "ttft_ms": "first token, ms", "trained_tokens": "tokens",
        "cpu_minutes": "CPU min",
    }  # fmt: skip
    shown = [{**row, "kept_percent": 100 * row["kept"], "size_mb": row["size_bytes"] / 1e6} for row in rows.values()]
    for row in shown:
        row["over_percent"] = 100 * (np.exp(row["over"][0]) - 1).item() if row["over"] else ""
    training = {"steps": STEPS, "lr": LR, "batch": BATCH, "length": LENGTH, "samples": SAMPLES}
    write(options.json, list(rows.values()), bars(rows), markdown(shown, columns), plotted=None, **training)


if __name__ == "__main__":
    main()
