r"""LoRA over int4 weights of SmolLM2-135M (QLoRA), merged and rounded anew: what training gains, what rounding takes.

    python -m benchmarks.llm.adapters --train wikitext2_valid.txt --test wikitext2_test.txt \
        --json benchmarks/results/adapters.json

Runs of mptrain, each in a process of its own, one thread; --folder keeps them, and a repeated command goes on:

    int4     weights in int4, symmetric blocks of 64, by GPTQ on 64 windows of the training text; embedding in int8
    tuned    over these (taken over from that run) adapters of rank 16 in all Linears of the layers, 300 steps of
             2 x 128 tokens of the training text, no teacher; merged; rounded anew as before
    plain    the same adapters over the float32 model; merged; a second stage rounds as above

Rows:

    fp32             the model as it comes, which was not trained on this text
    int4             the file that `int4` exports
    int4+adapter     `int4` with the adapter that `tuned` saved, loaded by peft: not merged
    merged           that, merged by peft, in float32
    merged/nearest   that, rounded anew to nearest in the same blocks
    tuned            the file that `tuned` exports: rounded anew by GPTQ
    lora             the adapters over float32, merged, in float32
    plain            the file that `plain` exports: these rounded by GPTQ

    ppl            of the first 6,080 tokens of the test text, windows of 256 tokens, stride 128; exported files by our
                   OpenVINO runner with float32 activations, the others by torch in float32
    over           {other row: [difference of the mean loss in nats a token, low, high]}, paired over runs of 128
                   tokens, 95%
    rounded        of rows rounded anew: how far rounding moved the adapted weights, of how far training did; in `tuned`
                   as the report has it
    kept           of them: the share of training's change that is left, along that change
    cpu_seconds, peak_bytes    of the run, all that it loads, exports and checks included; no CPU time of one that was
                   stopped and went on, for then the process has a part of it

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
from contextlib import closing
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import mptrain
from benchmarks.kit.paired import markdown, write
from benchmarks.llm_openvino import MODEL, STRIDE, losses, opened, paired

LENGTH, WINDOWS = 128, 600
TOKENS = 6080
CHECKED = 10_000  # characters of the runs' own validation and test, which judge nothing here
INT4 = {"mode": "weight_only", "method": "gptq", "block_size": 64}
ADAPTED = {"train": {"epochs": 1, "lr": 3e-4, "batch_size": 2}, "adapters": {"rank": 16, "alpha": 32}}
FIRST = {"id": "int4", "from": "model", "quantize": INT4}
RUNS: dict[str, list[dict[str, Any]]] = {
    "int4": [FIRST],
    "tuned": [FIRST, {"id": "tuned", "quantize": INT4, **ADAPTED}],
    "plain": [{"id": "lora", "from": "model", **ADAPTED}, {"id": "plain", "quantize": INT4}],
}
ROWS = ("fp32", "int4", "int4+adapter", "merged", "merged/nearest", "tuned", "lora", "plain")
AGAINST = ("fp32", "int4", "merged", "plain")
ROUNDED = ("merged/nearest", "tuned")


def recipe(folder: Path, name: str) -> dict[str, Any]:
    return {
        "schema": "mptrain/v1",
        "name": name,
        "model": {"path": MODEL, "task": "causal-lm"},
        "data": {split: str(folder / f"{split}.txt") for split in ("train", "validation", "test")}
        | {"max_length": LENGTH, "stride": LENGTH // 2, "max_samples": WINDOWS}
        | {"calibration": {"samples": 64, "batch_size": 4}},
        "stages": RUNS[name],
        "export": [{"id": "ov", "format": "openvino", "of": [name], "precision": ["compressed"], "cache": 512}],
        "evaluate": {"latency": {"batch": [1], "length": [32], "threads": [1], "runs": 1}},
        "output": {"dir": str(folder / name)},
    }


def split(train: Path, test: Path, folder: Path) -> None:
    """The training text, its end, and the beginning of the test text, as the runs read them."""
    text, judged = train.read_text(encoding="utf-8"), test.read_text(encoding="utf-8")
    texts = {"train": text[:-CHECKED], "validation": text[-CHECKED:], "test": judged[:CHECKED]}
    for name, part in texts.items():
        (folder / f"{name}.txt").write_text(part, encoding="utf-8")


def make(folder: Path, name: str) -> dict[str, Any]:
    """A run, in a process of its own."""
    from mptrain.recipe import Recipe
    from mptrain.run import run

    run(Recipe.model_validate(recipe(folder, name)), reuse=[folder / "int4"] if name == "tuned" else [])
    used = resource.getrusage(resource.RUSAGE_SELF)
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return {"cpu_seconds": used.ru_utime + used.ru_stime, "peak_bytes": 1024 * int(peak.split()[1])}


def made(folder: Path) -> dict[str, dict[str, Any]]:
    """Facts of each run; those that are there are not made again."""
    kept = folder / "runs.json"
    known = json.loads(kept.read_text()) if kept.is_file() else {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name in RUNS:
        if name not in known:
            command = [sys.executable, "-m", "benchmarks.llm.adapters", "--make", name, "--folder", str(folder)]
            went_on = (folder / name / "run.json").is_file()
            done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
            known[name] = json.loads(done.stdout.splitlines()[-1])
            if went_on:
                del known[name]["cpu_seconds"]
            kept.write_text(json.dumps(known))
            print(name, json.dumps(known[name]), flush=True)
    return known


def report(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / name / "report.json").read_text())


def stage(folder: Path, run: str, name: str) -> Path:
    return folder / run / report(folder, run)["checkpoints"][name]


def with_adapter(folder: Path) -> Any:
    """The int4 model with the adapter that was saved, by peft."""
    import peft

    base = mptrain.load(stage(folder, "int4", "int4"))
    return peft.PeftModel.from_pretrained(base, stage(folder, "tuned", "tuned") / "adapter").eval()


def to_nearest(model: nn.Module) -> nn.Module:
    from mptrain.compress.weights.weight_only import compress
    from mptrain.recipe import WeightOnly

    compress(model, WeightOnly.model_validate({**INT4, "method": "rtn"}), ())
    return model


def in_torch(name: str, folder: Path) -> nn.Module:
    """The model of a row; of one that is a file, the model that the file was made from."""
    from mptrain.models.load import load_model
    from mptrain.recipe import Model

    if name == "fp32":
        return load_model(Model(path=MODEL, task="causal-lm"), None, seed=0).eval()
    if name == "int4+adapter":
        return with_adapter(folder)
    if name.startswith("merged"):
        merged = with_adapter(folder).merge_and_unload().eval()
        return merged if name == "merged" else to_nearest(merged)
    return mptrain.load(stage(folder, "plain" if name == "lora" else name, name)).eval()


def run_by_torch(model: nn.Module) -> Any:
    @torch.no_grad()
    def run(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return {"logits": model(input_ids=torch.from_numpy(feeds["input_ids"])).logits.float().numpy()}

    return run


def scored(folder: Path, stream: list[int]) -> dict[str, np.ndarray]:
    """Losses by row; those that are there are read."""
    found = {}
    for name in ROWS:
        kept = folder / f"{name.replace('/', '-')}.npy"
        if not kept.is_file():
            if name in RUNS:
                (variant,) = (v for v in report(folder, name)["variants"] if v.get("path"))
                with closing(opened(folder / name / variant["path"])) as runner:
                    np.save(kept, losses(runner, stream))
            else:
                np.save(kept, losses(run_by_torch(in_torch(name, folder)), stream))
        found[name] = np.load(kept)
        print(f"{name}: {np.exp(found[name].mean()):.3f}", flush=True)
    return found


def linears(model: nn.Module) -> dict[str, torch.Tensor]:
    """Weights that have adapters: of all Linears but the output embedding."""
    modules = model.named_modules()
    return {n: m.weight.detach().double() for n, m in modules if isinstance(m, nn.Linear) and n != "lm_head"}


def rounding(base: nn.Module, adapted: nn.Module, rounded: nn.Module) -> dict[str, float]:
    """{"rounded", "kept"}, see above; over all weights that have adapters together."""
    trained = moved = along = 0.0
    start, end, last = linears(base), linears(adapted), linears(rounded)
    for name, before in start.items():
        change = end[name] - before
        trained += float(change.square().sum())
        moved += float((last[name] - end[name]).square().sum())
        along += float(((last[name] - before) * change).sum())
    return {"rounded": (moved / trained) ** 0.5, "kept": along / trained}


def furthest(one: nn.Module, other: nn.Module, stream: list[int]) -> float:
    """Of the first windows of the test text: the largest difference of two models' logits, of the largest logit."""
    found = []
    for first, last in pairwise(range(0, 5 * STRIDE, STRIDE)):
        ids = {"input_ids": np.asarray([stream[first:last]], dtype=np.int64)}
        a, b = run_by_torch(one)(ids)["logits"], run_by_torch(other)(ids)["logits"]
        found.append(float(np.abs(a - b).max() / np.abs(b).max()))
    return max(found)


def bars(rows: dict[str, dict[str, Any]]) -> list[tuple[str, bool]]:
    def below(name: str, other: str) -> bool:
        return rows[name]["over"][other][2] < 0

    same = "peft loads the saved adapter on that base, and computes what the merged weights do (1e-4 of the logits)"
    of_report = rows["tuned"]["rounded_reported"] / rows["tuned"]["rounded"]
    return [
        ("the adapter lowers the perplexity of its int4 base (interval)", below("merged", "int4")),
        (same, rows["int4+adapter"]["differs"] <= 1e-4),
        ("rounded anew to int4, it is below its int4 base still (interval)", below("tuned", "int4")),
        ("rounded anew to int4, it is below float32 adapters that are rounded (interval)", below("tuned", "plain")),
        ("the report says how far rounding moved the weights (1%)", abs(of_report - 1) < 0.01),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path)
    parser.add_argument("--test", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--folder", type=Path, help="where the runs go, and stay; default: a temporary one")
    parser.add_argument("--make", choices=list(RUNS), help=argparse.SUPPRESS)
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
    runs = made(folder)
    tokenizer = load_processor(Model(path=MODEL, task="causal-lm"))
    stream = tokenizer(options.test.read_text(encoding="utf-8"))["input_ids"][:TOKENS]
    found = scored(folder, stream)
    rows: dict[str, dict[str, Any]] = {}
    for name, loss in found.items():
        over = {other: paired(loss, found[other]) for other in AGAINST if other != name}
        rows[name] = {"name": name, "ppl": float(np.exp(loss.mean())), "over": over, **runs.get(name, {})}
    base, adapted = in_torch("int4", folder), in_torch("merged", folder)
    for name in ROUNDED:
        rows[name] |= rounding(base, adapted, in_torch(name, folder))
    rows["int4+adapter"]["differs"] = furthest(in_torch("int4+adapter", folder), adapted, stream)
    facts = report(folder, "tuned")["methods"]["tuned"]["facts"]["adapters"]
    rows["tuned"]["rounded_reported"] = facts["rounded"]
    columns = {
        "name": "row", "ppl": "perplexity", "over_int4": "nats over int4", "over_plain": "nats over plain",
        "rounded": "rounded", "kept": "kept", "cpu_seconds": "CPU s", "peak_gb": "peak GB",
    }  # fmt: skip
    shown = []
    for row in rows.values():
        extra = {"peak_gb": row["peak_bytes"] / 1e9} if "peak_bytes" in row else {}
        for other in ("int4", "plain"):
            if other in row["over"]:
                extra[f"over_{other}"] = "{:+.3f} ({:+.3f} to {:+.3f})".format(*row["over"][other])
        shown.append(row | extra)
    settings = {"tokens": TOKENS, "windows": WINDOWS, "length": LENGTH, **ADAPTED}
    settings |= {key: facts[key] for key in ("layers", "trained", "parameters")}
    if options.json:
        write(options.json, list(rows.values()), bars(rows), markdown(shown, columns), plotted=None, **settings)


if __name__ == "__main__":
    main()
