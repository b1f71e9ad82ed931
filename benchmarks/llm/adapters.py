r"""LoRA over int4 weights of SmolLM2-135M (QLoRA), merged and rounded anew: what training gains, what rounding takes.

    python -m benchmarks.llm.adapters --train wikitext2_valid.txt --test wikitext2_test.txt \
        --json benchmarks/results/adapters.json

Stages as a recipe has them (docs/adapters.md): weights rounded in symmetric blocks of 64, embedding in int8; over those
of GPTQ adapters of rank 16 in all Linears of the layers, one epoch of 600 windows of 128 tokens, two to a step, with
the text's own next tokens and no teacher; merged; rounded anew. One process to each, one thread; --folder keeps what
they make, and a repeated command goes on. Rows:

    fp32                    the model as it comes, which was not trained on this text
    int4/rtn, int4/gptq     rounded; GPTQ is calibrated on 64 windows of the training text
    adapted/rtn             a stage of adapters over int4/gptq: trained, merged, rounded anew to nearest
    adapted/peft            int4/gptq with the adapter that this stage saved, loaded by peft: not merged
    adapted                 that merged by peft, in fp32; rounded to nearest it is adapted/rtn, bit for bit (a bar)
    adapted/gptq            that rounded anew by GPTQ

    ppl          of the first 12,160 tokens of the test text, windows of 256 tokens, stride 128, by torch in fp32
    over         {other row: [difference of the mean loss in nats a token, low, high]}, paired over runs of 128 tokens,
                 95%
    moved        of rows rounded anew: how far rounding moved the adapted weights, of how far training did
    kept         of them: the share of training's change that is left, along that change
    cpu_seconds, peak_bytes    of the stage's process, all that it loads included

The weights of this model come from a file of 4 bits in asymmetric blocks of 32; these blocks are symmetric.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mptrain
from benchmarks.kit.paired import markdown, write
from benchmarks.llm_openvino import MODEL, STRIDE, TOKENS, losses, paired

LENGTH, WINDOWS = 128, 600
VALIDATION = 100  # one word in so many, the last ones of the training text
INT4 = {"mode": "weight_only", "bits": 4, "block_size": 64, "embeddings": "int8", "lm_head": "int8"}
TRAIN = {"epochs": 1, "lr": 3e-4, "batch_size": 2}
STAGES: list[dict[str, Any]] = [
    {"id": "int4-rtn", "from": "model", "quantize": {**INT4, "method": "rtn"}},
    {"id": "int4-gptq", "from": "model", "quantize": {**INT4, "method": "gptq"}},
    {"id": "adapted-rtn", "from": "int4-gptq", "train": TRAIN, "adapters": {"rank": 16, "alpha": 32}}
    | {"quantize": {**INT4, "method": "rtn"}},
]
MADE = [*(stage["id"] for stage in STAGES), "adapted-gptq"]
ROWS = ("fp32", "int4/rtn", "int4/gptq", "adapted/peft", "adapted", "adapted/rtn", "adapted/gptq")
AGAINST = ("fp32", "int4/gptq", "adapted")


def context(folder: Path) -> Any:
    """What the flow runs stages with. The recipe's export is not made: perplexity is torch's here."""
    from mptrain.data.load import load_data
    from mptrain.flow.stage import Context
    from mptrain.flow.stage_inputs import inputs_of
    from mptrain.models.processor import load_processor
    from mptrain.recipe import Recipe
    from mptrain.recipe.plan import phases
    from mptrain.train.launch import state

    files = {split: str(folder / f"{split}.txt") for split in ("train", "validation", "test")}
    recipe = Recipe.model_validate(
        {
            "schema": "mptrain/v1",
            "name": "adapters",
            "model": {"path": MODEL, "task": "causal-lm"},
            "data": files
            | {"max_length": LENGTH, "stride": LENGTH - 1, "max_samples": WINDOWS}
            | {"calibration": {"samples": 64, "batch_size": 4}},
            "stages": STAGES,
            "export": [{"id": "ov", "format": "openvino", "of": ["adapted-rtn"], "precision": ["compressed"]}],
            "output": {"dir": str(folder / "run")},
        }
    )
    processor = load_processor(recipe.model)
    data = load_data(recipe.data, recipe.model.task, processor, seed=recipe.seed)
    plan = {stage.id: phases(stage, data.rows(stage), 1) for stage in recipe.stages}
    return Context(inputs_of(recipe), data, processor, folder / "run", plan, state(), False)


def split(train: Path, test: Path, folder: Path) -> None:
    words = train.read_text(encoding="utf-8").split(" ")
    first = len(words) - len(words) // VALIDATION
    texts = {"train": words[:first], "validation": words[first:], "test": test.read_text(encoding="utf-8").split(" ")}
    for name, text in texts.items():
        (folder / f"{name}.txt").write_text(" ".join(text), encoding="utf-8")


def make(folder: Path, name: str) -> dict[str, Any]:
    """One stage, or adapted-gptq, in a process of its own."""
    from mptrain.compress.weights.weight_only import compress
    from mptrain.flow.stage import run_phase
    from mptrain.recipe import WeightOnly

    found = context(folder)
    facts = {}
    if name in found.plan:
        for phase in found.plan[name]:
            facts = run_phase(found, phase)["methods"]
        into = found.model_folder(name)
    else:
        model, into = with_adapter(folder).merge_and_unload(), folder / name
        calibration = found.inputs["int4-gptq"].data.calibration
        batches = found.data.calibration(calibration.samples, calibration.batch_size)
        compress(model, WeightOnly.model_validate({**INT4, "method": "gptq"}), batches)
        mptrain.save(model, into)
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    more = {"adapters": facts["adapters"]} if "adapters" in facts else {}
    made = {"model": str(into.relative_to(folder)), "cpu_seconds": used.ru_utime + used.ru_stime, **more}
    return made | {"peak_bytes": 1024 * int(peak.split()[1])}


def with_adapter(folder: Path) -> Any:
    """int4/gptq with the adapter that was saved."""
    import peft

    found = context(folder)
    base = mptrain.load(found.model_folder("int4-gptq"))
    return peft.PeftModel.from_pretrained(base, found.model_folder("adapted-rtn") / "adapter").eval()


def made(folder: Path) -> dict[str, dict[str, Any]]:
    """Facts of each stage, by its id; those that are there are not made again."""
    kept = folder / "stages.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for stage in MADE:
        if stage not in known:
            command = [sys.executable, "-m", "benchmarks.llm.adapters", "--make", stage, "--folder", str(folder)]
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            known[stage] = json.loads(done.stdout.splitlines()[-1])
            kept.write_text(json.dumps(known))
            print(stage, json.dumps(known[stage]), flush=True)
    return known


def opened(name: str, folder: Path, stages: dict[str, dict[str, Any]]) -> nn.Module:
    """The model of a row, in torch."""
    from mptrain.models.load import load_model
    from mptrain.recipe import Model

    if name == "fp32":
        return load_model(Model(path=MODEL, task="causal-lm"), None, seed=0).eval()
    if name in ("adapted/peft", "adapted"):
        model = with_adapter(folder)
        return model if name == "adapted/peft" else model.merge_and_unload().eval()
    return mptrain.load(folder / stages[name.replace("/", "-")]["model"]).eval()


def in_torch(model: nn.Module) -> Any:
    @torch.no_grad()
    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": model(input_ids=torch.from_numpy(feeds["input_ids"])).logits.float().numpy()}

    return run


def linears(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that have adapters: of all Linears but the output embedding."""
    modules = model.named_modules()
    return {n: m.weight.detach().double() for n, m in modules if isinstance(m, nn.Linear) and n != "lm_head"}


def rounding(base: nn.Module, adapted: nn.Module, rounded: nn.Module) -> dict[str, float]:
    """{"moved", "kept"}, see above; over all weights that have adapters together."""
    trained = moved = along = 0.0
    start, end, last = linears(base), linears(adapted), linears(rounded)
    for name, before in start.items():
        change = end[name] - before
        trained += float(change.square().sum())
        moved += float((last[name] - end[name]).square().sum())
        along += float(((last[name] - before) * change).sum())
    return {"moved": (moved / trained) ** 0.5, "kept": along / trained}


def same_bits(adapted: nn.Module, rounded: nn.Module) -> bool:
    """Whether `adapted` rounded to nearest, in place, has the weights of `rounded`."""
    from mptrain.compress.weights.weight_only import compress
    from mptrain.recipe import WeightOnly

    compress(adapted, WeightOnly.model_validate({**INT4, "method": "rtn"}), ())
    return all(torch.equal(one, other) for one, other in zip(adapted.parameters(), rounded.parameters(), strict=True))


def furthest(one: nn.Module, other: nn.Module, stream: list[int]) -> float:
    """Of the first windows of the test text: the largest difference of two models' logits, of the largest logit."""
    found = []
    for first, last in pairwise(range(0, 5 * STRIDE, STRIDE)):
        ids = {"input_ids": np.asarray([stream[first:last]], dtype=np.int64)}
        a, b = in_torch(one)(ids)["logits"], in_torch(other)(ids)["logits"]
        found.append(float(np.abs(a - b).max() / np.abs(b).max()))
    return max(found)


def scored(folder: Path, stages: dict[str, dict[str, Any]], stream: list[int]) -> dict[str, np.ndarray]:
    """Losses by row; those that are there are read."""
    found = {}
    for name in ROWS:
        file = folder / f"{name.replace('/', '-')}.npy"
        if not file.is_file():
            np.save(file, losses(in_torch(opened(name, folder, stages)), stream))
        found[name] = np.load(file)
        print(f"{name}: {np.exp(found[name].mean()):.3f}", flush=True)
    return found


def bars(rows: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    def below(name: str, other: str) -> bool:
        return rows[name]["over"][other][2] < 0

    return [
        ("the adapter lowers the perplexity of its int4 base (interval)", below("adapted", "int4/gptq")),
        (
            "peft loads the saved adapter on that base, and computes what the merged weights do (1e-4)",
            rows["adapted/peft"]["differs"] <= 1e-4,
        ),
        ("those, rounded to nearest, are the stage's weights, bit for bit", rows["adapted/rtn"]["same_bits"]),
        *(
            (f"{name}: rounded anew, it is below its int4 base still (interval)", below(name, "int4/gptq"))
            for name in ("adapted/gptq", "adapted/rtn")
        ),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the stages go, and stay; default: a temporary one")
    parser.add_argument("--make", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.make:
        print(json.dumps(make(options.folder, options.make)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        compared(options, options.folder or Path(temporary))


def compared(options: argparse.Namespace, folder: Path) -> None:
    from mptrain.models.processor import load_processor
    from mptrain.recipe import Model

    folder.mkdir(parents=True, exist_ok=True)
    split(options.train, options.test, folder)
    stages = made(folder)
    tokenizer = load_processor(Model(path=MODEL, task="causal-lm"))
    stream = tokenizer(options.test.read_text(encoding="utf-8"))["input_ids"]
    found = scored(folder, stages, stream)
    rows: dict[str, dict[str, Any]] = {}
    for name, loss in found.items():
        facts = {key: value for key, value in stages.get(name.replace("/", "-"), {}).items() if key != "model"}
        over = {other: paired(loss, found[other]) for other in AGAINST if other != name}
        rows[name] = {"name": name, "ppl": float(np.exp(loss.mean())), "over": over, **facts}
    base, adapted = (opened(name, folder, stages) for name in ("int4/gptq", "adapted"))
    for name in ("adapted/rtn", "adapted/gptq"):
        rows[name] |= rounding(base, adapted, opened(name, folder, stages))
    rows["adapted/peft"]["differs"] = furthest(opened("adapted/peft", folder, stages), adapted, stream)
    rows["adapted/rtn"]["same_bits"] = same_bits(adapted, opened("adapted/rtn", folder, stages))
    columns = {
        "name": "row", "ppl": "perplexity", "over_base": "nats over int4/gptq", "moved": "moved", "kept": "kept",
        "cpu_seconds": "CPU s", "peak_gb": "peak GB",
    }  # fmt: skip
    shown = []
    for row in rows.values():
        extra = {"peak_gb": row["peak_bytes"] / 1e9} if "peak_bytes" in row else {}
        if "int4/gptq" in row["over"]:
            extra["over_base"] = "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["over"]["int4/gptq"])
        shown.append(row | extra)
    settings = {"tokens": TOKENS, "windows": WINDOWS, "length": LENGTH, "train": TRAIN}
    if options.json:
        write(options.json, list(rows.values()), bars(rows), markdown(shown, columns), plotted=None, **settings)


if __name__ == "__main__":
    main()
