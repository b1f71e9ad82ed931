"""What mptrain does with each of many architectures: tiny random models, one row to each, one cell to each feature.

    PYTHONPATH=tests python -m benchmarks.reach --json benchmarks/results/reach.json [--rows PATTERN] [--cells PATTERN]

A cell is `ok`, `refused: <reason>` (an error of mptrain, which a recipe gets before training) or `FAIL: <error>`:

    found                  blocks that can be cut, by kind
    shrunk_equals_masked   on the model's own weights, half of the units of all blocks cut
    save_load              the shrunk model saved and loaded gives the same outputs, bit for bit
    movement_step          movement pruning: steps under growing masks, cut, a finite loss
    bf16_step              a step of AdamW with bf16 weights and fp32 masters lowers nothing to NaN
    ptq_int8               the shrunk model with int8 quantizers calibrated, in torch
    int4_gptq              weights in int4 by GPTQ
    palettize              weights in tables of 16 values
    openvino, onnx, coreml, coreai
                           the dense model in float32 in that format, run again, computes what the model computes

A repeated command keeps the cells of a file that was made with the same versions, and goes on; a cell that was not run
is not there. No timing. Versions stand at the top of the file, so that a run with newer packages is told apart.
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch
from kit.architectures import ARCHITECTURES, build, without_loss
from kit.structures import halved, zero_sinks
from torch import nn

import mptrain
from benchmarks.kit.paired import markdown, write
from mptrain.compress.boundary import cut
from mptrain.compress.prune.movement import MovementPruner
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure.dataflow.record import run
from mptrain.compress.structure.find import find_structure
from mptrain.compress.structure.shrink import shrink
from mptrain.compress.weights import palettize, weight_only
from mptrain.core.errors import MptrainError
from mptrain.flow.identity import versions
from mptrain.recipe import Ptq, WeightOnly
from mptrain.recipe.prune import Movement
from mptrain.recipe.weights import Palettize

ROWS = (
    "bert roberta xlm-roberta distilbert albert electra deberta-v2 mpnet modernbert nomic_bert gpt2 gpt_neox opt llama"
    " mistral qwen2 qwen3 gemma3_text phi3 mixtral qwen3_moe mamba t5 bart whisper wav2vec2 hubert"
    " audio-spectrogram-transformer vit deit dinov2 beit swin segformer clip siglip convnext resnet"
).split()
LENGTH = 16
"""tokens of a text, of formats that fix a longest"""
Cell = Callable[["Subject"], None]


class Subject:
    """One architecture: fresh copies of its model, and a batch."""

    def __init__(self, name: str) -> None:
        self._model, self.labelled = build(name)
        self.batch = without_loss(name, self.labelled)

    def model(self) -> nn.Module:
        return copy.deepcopy(self._model).eval()

    def shrunk(self) -> nn.Module:
        model = self.model()
        structure = find_structure(model, self.batch)
        return shrink(model, structure, halved(structure))


def shrunk_equals_masked(subject: Subject) -> None:
    model = subject.model()
    structure = find_structure(model, subject.batch)
    kept = halved(structure)
    masked = run(zero_sinks(subject.model(), structure, kept), subject.batch)
    _close(run(shrink(model, structure, kept), subject.batch), masked, 5e-5)


def save_load(subject: Subject) -> None:
    model = subject.shrunk()
    with tempfile.TemporaryDirectory() as folder:
        mptrain.save(model, Path(folder) / "model")
        loaded = mptrain.load(Path(folder) / "model").eval()
        _close(run(loaded, subject.batch), run(model, subject.batch), 0.0)


def movement_step(subject: Subject) -> None:
    model = subject.model().train()
    settings = {"method": "movement", "keep": {"encoder_params": 0.6}, "schedule": {"start": 0.0, "end": 0.75}}
    config = Movement.model_validate(settings | {"attention_block": [8, 8], "min_ffn": 1, "round_ffn": 1})
    structure = find_structure(model, subject.batch)
    pruner = MovementPruner(config, structure=structure, phase_steps=4, steps_per_epoch=4, lr=1e-3)
    model = pruner.prepare(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for step in range(4):
        optimizer.zero_grad()
        model(**subject.labelled).loss.backward()
        pruner.gradients(True)
        optimizer.step()
        pruner.updated(step + 1)
    _finite(cut(model, pruner), subject)


def bf16_step(subject: Subject) -> None:
    model = subject.model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    masters = mptrain.MasterWeights(model, optimizer, "bf16", kernel="torch")
    masters.backward(model(**subject.labelled).loss)
    masters.step()
    _finite(model, subject)


def ptq_int8(subject: Subject) -> None:
    _finite(quantizers.quantize(subject.shrunk(), Ptq(mode="ptq"), [subject.batch]), subject)


def int4_gptq(subject: Subject) -> None:
    model = subject.model()
    settings = {"block_size": 8, "embeddings": "fp32", "lm_head": "fp32", "allow_partial": True}
    weight_only.compress(model, WeightOnly.model_validate({"mode": "weight_only"} | settings), [subject.batch])
    _finite(model, subject)


def tables(subject: Subject) -> None:
    model = subject.model()
    config = Palettize.model_validate({"method": "kmeans", "bits": 4, "allow_partial": True})
    if not palettize.palettize(model, config, [subject.labelled]):
        raise RuntimeError("no weight has a table")


def exported(format: str) -> Cell:
    """Written, opened by the format's runner and compared, within the default gate."""

    def check(subject: Subject) -> None:
        with tempfile.TemporaryDirectory() as folder:
            target = Path(folder) / "model"
            done = mptrain.export(subject.model(), format, to=target, data=subject.batch, length=LENGTH)
            if not done.passed:
                raise RuntimeError(f"differs by {done.facts['parity']['relative']:.2g} of the largest output")

    return check


CELLS: dict[str, Cell] = {
    "shrunk_equals_masked": shrunk_equals_masked,
    "save_load": save_load,
    "movement_step": movement_step,
    "bf16_step": bf16_step,
    "ptq_int8": ptq_int8,
    "int4_gptq": int4_gptq,
    "palettize": tables,
    "openvino": exported("openvino"),
    "onnx": exported("onnx"),
    "coreml": exported("coreml"),
    "coreai": exported("coreai"),
}


def fill(row: dict[str, str], wanted: list[str]) -> bool:
    """Run the cells that a row lacks, in place; whether there were any."""
    missing = [key for key in wanted if key not in row]
    subject = Subject(row["name"]) if missing else None
    for key in missing:
        assert subject is not None
        row[key] = found(subject) if key == "found" else cell(CELLS[key], subject)
    return bool(missing)


def kept(path: Path) -> dict[str, dict[str, str]]:
    """The rows of a file that was made with the packages that are installed, by name."""
    if not path.is_file():
        return {}
    before = json.loads(path.read_text(encoding="utf-8"))
    now = versions()
    if any(now.get(name) != version for name, version in before["versions"].items() if name != "mptrain"):
        return {}
    return {row["name"]: row for row in before["rows"]}


def found(subject: Subject) -> str:
    try:
        structure = find_structure(subject.model(), subject.batch)
    except MptrainError as error:
        return f"refused: {_words(error)}"
    kinds = Counter(block.kind for block in structure)
    return ", ".join(f"{number} {kind}" for kind, number in kinds.items())


def cell(check: Cell, subject: Subject) -> str:
    try:
        check(subject)
    except MptrainError as error:
        return f"refused: {_words(error)}"
    except Exception as error:  # whatever it is, it belongs into the table
        return f"FAIL: {type(error).__name__}: {_words(error)}"
    return "ok"


def _words(error: Exception) -> str:
    text = re.sub(r"/\S*/", "", " ".join(str(error).split()))  # folders of this machine
    return text if len(text) <= 160 else f"{text[:157]}…"


def _close(a: list[torch.Tensor], b: list[torch.Tensor], tolerance: float) -> None:
    for x, y in zip(a, b, strict=True):
        scale = max(1.0, float(y.abs().max()))
        torch.testing.assert_close(x, y, rtol=0, atol=tolerance * scale, equal_nan=True)


def _finite(model: nn.Module, subject: Subject) -> None:
    if not all(bool(x.isfinite().all()) for x in run(model.eval(), subject.batch)[:1]):
        raise RuntimeError("the outputs are not finite")


def main() -> None:
    parser = argparse.ArgumentParser(prog="benchmarks.reach", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", default="*", metavar="PATTERN")
    parser.add_argument("--cells", default="*", metavar="PATTERN", help="columns, e.g. openvino; default: all")
    parser.add_argument("--all", action="store_true", help="every architecture of tests/kit, not the listed ones only")
    options = parser.parse_args()
    columns = fnmatch.filter(["found", *CELLS], options.cells)
    names = list(ARCHITECTURES if options.all else ROWS)
    rows = kept(options.json)
    for name in fnmatch.filter(names, options.rows):
        row = rows.setdefault(name, {"name": name})
        if fill(row, columns):
            print("\t".join([name, *(f"{key}: {row[key]}" for key in columns)]), flush=True)
            save(options.json, [rows[known] for known in names if known in rows])
    save(options.json, [rows[known] for known in names if known in rows])


def save(path: Path, rows: list[dict[str, str]]) -> None:
    prunable = sum(one.get("shrunk_equals_masked") == "ok" for one in rows)
    failed = [f"{one['name']} {key}" for one in rows for key, value in one.items() if value.startswith("FAIL")]
    bars = [("no cell is FAIL", not failed), ("30 architectures or more can be pruned", prunable >= 30)]
    shown = [{key: one.get(key, "not run") for key in ("name", "found", *CELLS)} for one in rows]
    table = markdown(shown, {"name": "architecture", "found": "found", **{key: key.replace("_", " ") for key in CELLS}})
    write(path, rows, bars, table, plotted=None)


if __name__ == "__main__":
    main()
