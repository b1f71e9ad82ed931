r"""Perplexity and size of a compressed OPT, ours against coremltools: Apple's two OPT tables.

    .venv-bench/bin/python -m benchmarks.weights.opt_table --model DIR --text DIR \
        --json benchmarks/results/opt_table.json

DIR of --text holds calibration.txt, all that compression and fine-tuning read, and test.txt, all that is scored.
Linear layers are compressed; embeddings and the tied lm_head are left alone, for coremltools' SKM fails on them.
Sizes are of weights: integers packed, scales and tables in fp16, everything else in fp16, on both sides.
A row that is in the JSON already is not computed again. `seconds` are of the compression, calibration included,
on both sides (CPU time of the one thread); those of skm_ft are of its k-means, without the tuning.

    method   rtn, scale, gptq      integers, against coremltools' PostTrainingQuantizer (symmetric)
             pt, skm, skm_ft       tables: data-free, sensitive k-means, and those fine-tuned (tables, biases and
                                   norms train, and each weight takes the entry nearest to it at every step);
                                   against PostTrainingPalettizer (pt) and SKMPalettizer (skm, skm_ft)
"""

from __future__ import annotations

import argparse
import copy
import fnmatch
import functools
import json
import logging
import math
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from benchmarks.kit.paired import clock, markdown, write
from mptrain.compress.weights import records
from mptrain.compress.weights.palettize import palettize
from mptrain.compress.weights.table_training import TableTrainer
from mptrain.compress.weights.weight_only import compress
from mptrain.recipe import Palettize, TableTraining, WeightOnly

logging.disable(logging.WARNING)
warnings.simplefilter("ignore")
from coremltools.optimize.torch import palettization as ct_palettization  # noqa: E402
from coremltools.optimize.torch import quantization as ct_quantization  # noqa: E402

INTEGERS = ("rtn", "scale", "gptq")
UNITS = ["tensor", "channel", *(f"block{n}" for n in (256, 128, 64, 32, 16, 8, 4))]
TABLES = ["tensor", "group32", "group16", "group4", "group16+scale"]
WINDOWS = 32  # of calibration, for scales and GPTQ
# of calibration, one to a batch, for SKM on both sides: on the last fifth of the calibration text six configs, 4 to
# 2 bits, came out no worse with 4 than with 32 (on average by less than 0.1)
SKM_WINDOWS = 4
# chosen there too
TUNING = {"epochs": 1, "batch": 8, "lr": 1e-3, "weights_lr": 1e-4, "refresh": 1}
KEYS = "_COREML_/weight/"


def rows() -> Iterator[tuple[str, str]]:
    """(config, method), those that bars speak of first."""
    everything = [(f"{bits}b/{unit}", m) for bits in (4, 8) for unit in UNITS for m in INTEGERS]
    everything += [(f"{bits}b/{unit}", m) for bits in (4, 3, 2) for unit in TABLES for m in ("pt", "skm")]
    everything += [(f"{bits}b/{unit}", "skm_ft") for bits in (4, 3, 2) for unit in TABLES]
    first = [("4b/block32", m) for m in INTEGERS]
    first += [(f"{bits}b/group4", m) for bits in (3, 2) for m in ("skm", "skm_ft")]
    yield from dict.fromkeys(first + everything)


class Bench:
    def __init__(self, model: Path, text: Path, tokens: int) -> None:
        self.folder = model
        tokenizer = AutoTokenizer.from_pretrained(model)
        self.length = self.fresh().config.max_position_embeddings
        self.test = self.windows(tokenizer, text / "test.txt")[: tokens // self.length]
        self.tuning = self.windows(tokenizer, text / "calibration.txt")
        # spread over the text
        self.calibration = self.tuning[:: len(self.tuning) // WINDOWS][:WINDOWS].split(4)
        self.sensitive = self.tuning[:: len(self.tuning) // SKM_WINDOWS][:SKM_WINDOWS].split(1)
        self.uncompressed = self.perplexity(self.fresh())

    def fresh(self) -> PreTrainedModel:
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def windows(self, tokenizer: Any, file: Path) -> Tensor:
        """[n, length], one after the other."""
        ids = torch.tensor(tokenizer(file.read_text(encoding="utf-8"))["input_ids"])
        return ids[: len(ids) // self.length * self.length].view(-1, self.length)

    @torch.no_grad()
    def perplexity(self, model: nn.Module) -> float:
        nll, count = 0.0, 0
        for ids in self.test.split(16):
            logits = model(input_ids=ids).logits[:, :-1].flatten(0, 1)
            nll += float(cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"))
            count += ids[:, 1:].numel()
        return math.exp(nll / count)

    # -- ours

    def ours(self, config: str, method: str) -> tuple[float, int, float]:
        """(perplexity, bytes, seconds)"""
        model = self.fresh()
        begun = clock()
        bits, unit, scaled = parse(config)
        if method in INTEGERS:
            name, size = (unit, 32) if not unit.startswith("block") else ("block", int(unit[5:]))
            how = WeightOnly(
                mode="weight_only", method=method, bits=bits, granularity=name, block_size=size,
                embeddings="fp32", lm_head="fp32",
            )  # fmt: skip
            batches = [{"input_ids": ids} for ids in self.calibration] if method != "rtn" else []
            compress(model, how, batches)
            took = clock() - begun
        else:
            batches = [{"input_ids": ids, "labels": ids} for ids in self.sensitive]
            found = palettize(model, self.tables(bits, unit, scaled, method), batches if method != "pt" else None)
            took = clock() - begun
            if method == "skm_ft":
                self.tune(model, found)
            else:
                records.attach(model, found)
        stored = records.distinct(records.of(model))
        rest = sum(p.numel() for name, p in model.named_parameters() if name not in stored)
        size = 2 * rest + sum(map(records.stored_bytes, stored.values()))
        return self.perplexity(model), size, took

    def tables(self, bits: int, unit: str, scaled: bool, method: str) -> Palettize:
        group = {"granularity": "tensor"} if unit == "tensor" else {"group_size": int(unit[5:])}
        return Palettize(
            method="kmeans" if method == "pt" else "skm", bits=bits, per_channel_scale=scaled,
            embeddings=False, lm_head=False, **group,
        )  # fmt: skip

    def tune(self, model: nn.Module, found: dict[str, records.Palettized]) -> None:
        """Train to give the logits of the uncompressed model on the calibration text; embeddings stay as they are."""
        teacher = copy.deepcopy(model).requires_grad_(False)
        trainer = TableTrainer(found, TableTraining(refresh=int(TUNING["refresh"])), lr=TUNING["lr"])
        trainer.prepare(model)
        small = [p for p in model.parameters() if p.ndim == 1]
        weights = [p for name, p in model.named_parameters() if name in found]
        groups = [{"params": small, "lr": TUNING["lr"]}, {"params": weights, "lr": TUNING["weights_lr"]}]
        optimizer = torch.optim.Adam(trainer.parameter_groups() + groups)
        order = torch.Generator().manual_seed(0)
        batches = [
            batch
            for _ in range(int(TUNING["epochs"]))
            for batch in self.tuning[torch.randperm(len(self.tuning), generator=order)].split(int(TUNING["batch"]))
        ]
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, len(batches))
        for step, ids in enumerate(tqdm(batches, "tuning", disable=None, leave=False)):
            model.zero_grad()
            with torch.no_grad():
                target = log_softmax(teacher(input_ids=ids).logits, -1)
            given = log_softmax(model(input_ids=ids).logits, -1)
            kl_div(given.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True).backward()
            trainer.gradients(True)
            optimizer.step()
            trainer.updated(step + 1)
            schedule.step()
        records.attach(model, trainer.records())

    # -- coremltools

    @functools.cache  # noqa: B019 (one bench to a process)
    def theirs(self, config: str, method: str) -> tuple[float, int, list[str], float]:
        """(perplexity, bytes, names of the layers that it skipped, seconds)"""
        bits, unit, scaled = parse(config)
        model = self.fresh()
        begun = clock()
        if method == "integers":
            block = {"granularity": "per_block", "block_size": int(unit[5:])} if unit.startswith("block") else {}
            how: dict[str, Any] = {"weight_dtype": f"int{bits}", "granularity": f"per_{unit}", **block}
        else:
            group = {"granularity": "per_tensor"}
            if unit != "tensor":
                group = {"granularity": "per_grouped_channel", "group_size": int(unit[5:])}  # type: ignore[dict-item]
            how = {"n_bits": bits, "enable_per_channel_scale": scaled, **group}
        spec = {"module_type_configs": {"Linear": how}, "module_name_configs": {"lm_head": None}}
        if method == "integers":
            config_ = ct_quantization.PostTrainingQuantizerConfig.from_dict(spec)
            model = ct_quantization.PostTrainingQuantizer(model, config_).compress()
        elif method == "pt":
            config_ = ct_palettization.PostTrainingPalettizerConfig.from_dict(spec)
            model = ct_palettization.PostTrainingPalettizer(model, config_).compress(num_kmeans_workers=1)
        else:
            config_ = ct_palettization.SKMPalettizerConfig.from_dict(spec)
            palettizer = ct_palettization.SKMPalettizer(model, config_)
            model = palettizer.compress(
                dataloader=list(self.sensitive), loss_fn=lambda m, ids: m(input_ids=ids, labels=ids).loss
            )
        took = clock() - begun
        size, skipped, seen = 0, [], set()
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if isinstance(module, nn.Linear) and name != "lm_head":
                parts = {k.removeprefix(KEYS): b for k, b in module.named_buffers(recurse=False) if k.startswith(KEYS)}
                tables = [parts[k] for k in ("quantization_scale", "lut", "palettization_scale") if k in parts]
                seen.add(id(weight))
                if not any(k in parts for k in ("quantization_scale", "lut")):
                    skipped.append(name)
                    size += 2 * weight.numel()
                else:
                    size += -(-weight.numel() * bits // 8) + 2 * sum(t.numel() for t in tables)
        size += 2 * sum(p.numel() for p in model.parameters() if id(p) not in seen)
        return self.perplexity(model), size, skipped, took


def parse(config: str) -> tuple[int, str, bool]:
    bits, unit = config.split("b/")
    return int(bits), unit.removesuffix("+scale"), unit.endswith("+scale")


def row(bench: Bench, config: str, method: str) -> dict[str, Any]:
    ppl, size, took = bench.ours(config, method)
    kind = "integers" if method in INTEGERS else "pt" if method == "pt" else "skm"
    try:
        ct_ppl, ct_size, skipped, ct_took = bench.theirs(config, kind)
    except Exception as error:  # whatever coremltools cannot do is part of the result
        ct_ppl, ct_size, ct_took = None, None, None
        skipped = [f"failed: {type(error).__name__}: {str(error)[:200]}"]
    return {
        "config": config,
        "method": method,
        "size_bytes": size,
        "ppl": ppl,
        "size_bytes_coremltools": ct_size,
        "ppl_coremltools": ct_ppl,
        "ppl_uncompressed": bench.uncompressed,
        "seconds": took,
        "seconds_coremltools": ct_took,
        "coremltools_skipped": skipped,
    }


def bars(done: list[dict[str, Any]]) -> list[tuple[str, bool]]:
    def increase(config: str, method: str, key: str = "ppl") -> float | None:
        found = [r for r in done if (r["config"], r["method"]) == (config, method) and r[key] is not None]
        return found[0][key] - found[0]["ppl_uncompressed"] if found else None

    verdicts = []
    for config in dict.fromkeys(r["config"] for r in done):
        for methods in (INTEGERS, ("pt", "skm", "skm_ft")):
            same = [r for r in done if r["config"] == config and r["method"] in methods and r["ppl_coremltools"]]
            if same and not any(r["coremltools_skipped"] for r in same):
                best = min(same, key=lambda r: r["ppl"])
                theirs = min(r["ppl_coremltools"] for r in same)
                good = best["ppl"] <= theirs and best["size_bytes"] <= max(r["size_bytes_coremltools"] for r in same)
                text = f"{config}: {best['method']} {best['ppl']:.3f}, coremltools {theirs:.3f} at equal size"
                verdicts.append((text, good))
    rtn = increase("4b/block32", "rtn")
    best32 = [v for m in INTEGERS if (v := increase("4b/block32", m)) is not None]
    if rtn is not None and best32:
        text = f"best int4 block 32: {min(best32):+.3f}, at most half of rtn's {rtn:+.3f}"
        verdicts.append((text, min(best32) <= rtn / 2))
    for config in dict.fromkeys(r["config"] for r in done if r["method"] == "skm_ft" and r["config"][0] in "32"):
        ours, theirs_ = increase(config, "skm_ft"), increase(config, "skm_ft", "ppl_coremltools")
        if ours is not None and theirs_ is not None:
            text = f"{config} skm_ft: {ours:+.3f}, at most half of coremltools SKM's {theirs_:+.3f}"
            verdicts.append((text, ours <= theirs_ / 2))
    timed = [r for r in done if r["method"] in ("pt", "skm") and r["seconds_coremltools"] is not None]
    if timed:
        ratio = sum(r["seconds_coremltools"] for r in timed) / sum(r["seconds"] for r in timed)
        each = [r["seconds_coremltools"] / r["seconds"] for r in timed]
        text = f"palettization: all {len(timed)} rows in {ratio:.1f} times less time than coremltools, at least 10"
        verdicts.append((f"{text} (single rows {min(each):.1f} to {max(each):.1f})", ratio >= 10))
    return verdicts


def plot(done: list[dict[str, Any]], path: Path) -> None:
    """Perplexity over size, and the Pareto front of each side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    sides = {
        "mptrain": ("size_bytes", "ppl", "o", "tab:blue"),
        "coremltools": ("size_bytes_coremltools", "ppl_coremltools", "x", "tab:orange"),
    }
    for label, (size, ppl, marker, colour) in sides.items():
        points = sorted(
            (r[size] / 1e6, r[ppl]) for r in done if r[ppl] is not None and r[ppl] < 2 * r["ppl_uncompressed"]
        )
        axes.scatter(*zip(*points, strict=True), marker=marker, color=colour, alpha=0.5, label=label)
        front: list[tuple[float, float]] = []
        for point in points:
            if not front or point[1] < front[-1][1]:
                front.append(point)
        axes.step(*zip(*front, strict=True), where="post", color=colour)
    axes.axhline(done[0]["ppl_uncompressed"], color="grey", linestyle=":", label="uncompressed")
    axes.set(xlabel="MB of weights", ylabel="test perplexity")
    axes.legend()
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a trained OPT and its tokenizer")
    parser.add_argument("--text", type=Path, required=True, help="folder with calibration.txt and test.txt")
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rows", default="*", help="pattern on CONFIG/METHOD, e.g. '4b/block32/*'")
    parser.add_argument("--tokens", type=int, default=60_000, help="of the test text")
    options = parser.parse_args()
    torch.set_num_threads(1)
    bench = Bench(options.model, options.text, options.tokens)
    more = {"tokens": bench.test.numel(), "window": bench.length, "stride": bench.length}
    done: list[dict[str, Any]] = []
    if options.json.is_file():
        before = json.loads(options.json.read_text())
        if {k: before.get(k) for k in more} == more:
            done = before["rows"]
    have = {(r["config"], r["method"]) for r in done}
    for config, method in rows():
        if (config, method) in have or not fnmatch.fnmatch(f"{config}/{method}", options.rows):
            continue
        done.append(row(bench, config, method))
        print({k: round(v, 3) if isinstance(v, float) else v for k, v in done[-1].items()}, flush=True)
        columns = {key: key.replace("_", " ") for key in done[0] if key != "coremltools_skipped"}
        shown = [{k: "–" if v is None else v for k, v in r.items()} for r in done]
        write(options.json, done, bars(done), markdown(shown, columns), plotted=None, **more)
        plot(done, options.json.with_suffix(".png"))


if __name__ == "__main__":
    main()
