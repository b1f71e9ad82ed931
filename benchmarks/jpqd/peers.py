"""JPQD with the structure that another library chooses: the peers of benchmarks/jpqd/curve.py.

    make setup-bench
    .venv-bench/bin/python -m benchmarks.jpqd.peers --json benchmarks/results/jpqd.jsonl

The same dense model, data, seed and encoder parameters kept as in benchmarks/jpqd/curve.py. The peer
prunes the dense model at once, with 256 training examples; then the model trains like ours, with
the same steps, quantization and distillation, and is exported, scored and timed alike. So the
points differ in what was chosen to be cut. curve.py's `one_shot` points are ours in that order.

    torch_pruning      torch-pruning 1.6, global Taylor importance, whole heads
    modelopt_gradnas   nvidia-modelopt 0.43, gradnas (0.45 dropped it); it needs transformers
                       below 5, which lie in a folder of their own for a process of its own
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.jpqd import curve
from benchmarks.jpqd.peer_torch_pruning import prune_with_torch_pruning
from mptrain.compress.structure import costs
from mptrain.compress.structure.blocks import Kept, Structure
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.core.disk import write_json
from mptrain.data.load import load_data
from mptrain.models import artifact
from mptrain.models.processor import load_processor

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
POINTS = [f"{peer}/one_shot/{kept}/0" for kept in (50, 33) for peer in ("torch_pruning", "modelopt_gradnas")]
BATCH = 16

Weights = dict[str, Tensor]


def prune_with_gradnas(dense: Path, batches: list[dict[str, Tensor]], params: int) -> Weights:
    """In a process with the older transformers. params: of the whole model, at most."""
    older = ROOT / ".venv-bench" / "gradnas"
    if not older.is_dir():
        raise SystemExit(f"{older} is missing: run `make setup-bench`.")
    with tempfile.TemporaryDirectory() as scratch:
        given, found = Path(scratch, "batches.safetensors"), Path(scratch, "pruned.safetensors")
        flat = {f"{i}.{name}": t.contiguous() for i, batch in enumerate(batches) for name, t in batch.items()}
        save_file(flat, given)
        command = [sys.executable, str(HERE / "peer_gradnas.py"), str(dense), str(given), str(params), str(found)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": str(older)})
        return load_file(found)


PEERS: dict[str, Callable[[Path, list[dict[str, Tensor]], int], Weights]] = {
    "torch_pruning": prune_with_torch_pruning,
    "modelopt_gradnas": prune_with_gradnas,
}


def kept_of(structure: Structure, dense: Weights, pruned: Weights) -> Kept:
    """The units whose rows the peer left, found by their values: pruning moves rows, it does not change them."""
    kept = Kept()
    for block in structure:
        first = block.sources[0]
        rows = set(_rows(dense[first.parameter], pruned[first.parameter]))
        kept.units[block.name] = [u for u, indices in enumerate(first.indices.tolist()) if rows.intersection(indices)]
        assert len(kept.units[block.name]) * first.per_unit == len(rows), "the peer cut through a head"
    return kept


def _rows(dense: Tensor, pruned: Tensor) -> list[int]:
    index = {row.numpy().tobytes(): i for i, row in enumerate(dense)}
    return [index[row.numpy().tobytes()] for row in pruned]


def run_point(point: str, data: Path | None, work: Path) -> dict[str, Any]:
    from mptrain.flow.reuse import take_stages
    from mptrain.flow.run_folder import check_identity
    from mptrain.recipe import file as recipe_file
    from mptrain.run import identity, run

    peer, _, kept_percent, seed = point.split("/")
    begun = time.monotonic()
    described = curve.recipe(f"magnitude/one_shot/{kept_percent}/{seed}", data, work)
    folder = work / point.replace("/", "-")
    described["output"]["dir"] = str(folder)
    phase = folder / "stages" / "jpqd" / "0-prune"
    if not (phase / "done.json").is_file():
        checked = recipe_file.validate(described, point)
        processor = load_processor(checked.model)
        examples = load_data(checked.data, checked.model.task, processor, seed=checked.seed)
        calibration = checked.data.calibration.model_copy(update={"batch_size": BATCH})
        this = identity(checked, examples, 1)
        folder.mkdir(parents=True, exist_ok=True)
        check_identity(folder, this)
        take_stages(folder, this, [curve.dense_run(seed, data, work)])
        (source,) = (folder / "stages" / "dense").glob("*/model")
        model = artifact.load(source)
        structure = find_structure(model)
        encoder = sum(costs.params(block, block.units) for block in structure)
        total = sum(p.numel() for p in model.parameters())
        params = total - round((1 - int(kept_percent) / 100) * encoder)
        pruned = PEERS[peer](source, list(examples.labelled(calibration)), params)
        kept = kept_of(structure, {n: p.detach() for n, p in model.named_parameters()}, pruned)
        facts = costs.describe(structure, kept)
        artifact.save(shrink(model, structure, kept).eval(), phase / "model", processor)
        write_json(
            phase / "done.json",
            {"history": [], "wall_s": time.monotonic() - begun, "methods": {"prune": {"structure": facts}}},
        )
    report = run(recipe_file.validate(described, point))
    return curve.line(point, report, folder, begun)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="one line per point; appended to")
    parser.add_argument("--data", type=Path, help="folder with train.tsv, dev.tsv and test.tsv (text TAB label)")
    parser.add_argument("--work", type=Path, default=Path("runs/bench-jpqd"), help="folder for the runs")
    options = parser.parse_args()
    torch.manual_seed(0)
    for point in POINTS:
        if point in curve.read(options.json):
            continue
        print(f"== {point}", file=sys.stderr, flush=True)
        line = run_point(point, options.data, options.work)
        with options.json.open("a") as file:
            file.write(json.dumps(line) + "\n")
    from benchmarks.jpqd.summary import summarize

    print(summarize(list(curve.read(options.json).values()), options.json))
    return 0


if __name__ == "__main__":
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    sys.exit(main())
