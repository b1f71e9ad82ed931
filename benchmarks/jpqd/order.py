"""In what order to prune and quantize in one stage: joint against the quantizers later, and why.

    python -m benchmarks.jpqd.order --json benchmarks/results/joint_order.json
    python -m benchmarks.jpqd.order --json longer.json --steps 278 --only 'fisher/*/0'

One dense MiniLM of the film reviews (2 epochs, trained here unless --dense names it) is teacher, start and measure of
all arms. An arm is a way to a third of the encoder in int8 within the same number of optimizer steps on the same
batches; what the arms are is `ARMS`. They are shorter than a run of a recipe (--steps; the recipe has 556), are scored
as torch models with their fake quantizers, and nothing is chosen by the validation split: the last step counts. Arms
that share what comes before the cut share it here too. The teacher's logits are computed once.

Beside the arms: `noise`, whether quantizers change which units Fisher pruning would keep; `cuts`, what was kept and how
far off the ranges are that a cut leaves. Rows that are in the file are kept, so a command that was stopped can be
repeated; so are the cut models, in --work.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from benchmarks.jpqd import order_facts as facts
from benchmarks.jpqd.curve import add_dense, dense_of
from benchmarks.jpqd.order_table import markdown, packed, setting, unpacked
from mptrain.compress.base import Method, Tools, TrainingMethod
from mptrain.compress.methods import acting, finalized, methods_of, prepared
from mptrain.compress.quantize import quantizers
from mptrain.core.hooks import HOOKS, is_quantized
from mptrain.core.host import host
from mptrain.data.load import Task
from mptrain.flow.identity import versions
from mptrain.models import artifact
from mptrain.recipe import Calibration, Curvature, Distill, Fisher, Qat
from mptrain.train.distill import Distiller
from mptrain.train.phase import learning_rate
from mptrain.train.sampler import LengthGroupedSampler
from mptrain.train.taught import Taught, keys_of

FAST = 30.0
LR, BATCH, KEEP = 1e-4, 32, {"encoder_params": 0.33}
SEEDS = (0, 1, 2)
SAMPLES = Calibration(samples=512, batch_size=32)
QAT = Qat(mode="qat")
DISTILL = Distill(weight=0.9, temperature=2)


@dataclass(frozen=True)
class Before:
    """What happens up to the cut. method: of pruning. quantized: whether the quantizers act in it. learn: whether
    their ranges train in it. rate: the learning rate of the ranges, in parts of that of the weights."""

    method: str
    quantized: bool
    learn: bool = True
    rate: float = 1.0


@dataclass(frozen=True)
class Arm:
    """before: of `BEFORE`. fresh: ranges are calibrated where the quantizers begin to act after the cut, else those
    that came through it. late: they begin with the last third of the steps. quantized: False, never. rate: that of the
    ranges after the cut; None, as before it."""

    before: str
    fresh: bool = True
    late: bool = False
    quantized: bool = True
    rate: float | None = None


BEFORE = {
    "fisher/joint": Before("fisher", True),
    "fisher/float": Before("fisher", False),
    "curvature/joint": Before("curvature", True),
    "curvature/float": Before("curvature", False),
    "fisher/frozen": Before("fisher", True, learn=False),
    "fisher/fast": Before("fisher", True, rate=FAST),
}
ARMS = {
    "fisher/joint": Arm("fisher/joint", fresh=False),
    "fisher/joint, recalibrated": Arm("fisher/joint"),
    "fisher/after_prune": Arm("fisher/float"),
    "curvature/after_prune": Arm("curvature/float"),
    "curvature/joint": Arm("curvature/joint", fresh=False),
    "curvature/last third": Arm("curvature/float", late=True),
    "fisher/last third": Arm("fisher/float", late=True),
}
MORE = {
    "curvature/never": Arm("curvature/float", quantized=False),
    "fisher/joint, ranges frozen": Arm("fisher/frozen", fresh=False),
    "fisher/joint, ranges fast": Arm("fisher/fast", fresh=False),
    "fisher/after_prune, ranges fast": Arm("fisher/float", rate=FAST),
    "curvature/after_prune, ranges fast": Arm("curvature/float", rate=FAST),
}


@dataclass
class Bench:
    """task: the reviews. dense: folder of the dense model. work: for what is kept between commands. steps: of a stage,
    warmup of them before the cut of gradual pruning, and the last third from `late` on."""

    task: Task
    dense: Path
    work: Path
    steps: int
    warmup: int
    late: int

    def teacher(self) -> Distiller:
        """Asked once, in all commands."""
        path = self.work / "teacher.npz"
        if not path.is_file():
            model = artifact.load(self.dense)
            found = {split: logits(model, self.task, split) for split in ("train", "validation", "test")}
            np.savez(path, **found)
        table, task = np.load(path), self.task
        splits = [getattr(task, split) for split in table]
        examples = [rows[i] for rows in splits for i in range(len(rows))]
        keys = [key for one in examples for key in keys_of(task.without_targets(task.collate([one])))]
        found = Distiller(artifact.load(self.dense), DISTILL, term=task.distillation, targets=task.kind.targets)
        found.taught = Taught(keys, {"logits": torch.cat([torch.from_numpy(table[split]) for split in table])})
        return found

    def margins(self, split: str) -> np.ndarray:
        """Of the teacher."""
        found = np.load(self.work / "teacher.npz")[split]
        return found[:, 1] - found[:, 0]


@torch.no_grad()
def logits(model: nn.Module, task: Task, split: str, rows: int | None = None) -> np.ndarray:
    """[rows, classes] in data-set order; batches of like length."""
    examples = getattr(task, split)
    chosen = sorted(range(len(examples))[:rows], key=examples.lengths.__getitem__)
    training, found = model.training, np.zeros((len(chosen), 2), np.float32)
    model.eval()
    for at in range(0, len(chosen), 64):
        part = chosen[at : at + 64]
        batch = task.without_targets(task.collate([examples[i] for i in part]))
        found[part] = model(**batch).logits.float().numpy()
    model.train(training)
    return found


def train(
    model: nn.Module,
    steps: range,
    seed: int,
    bench: Bench,
    acting_methods: list[TrainingMethod],
    *,
    learn: bool = True,
    rate: float = 1.0,
) -> dict[str, Any]:
    """Optimizer steps `steps` of the stage, as a phase of a run takes them; what was seen on the way."""
    task, teacher = bench.task, bench.teacher()
    order = list(LengthGroupedSampler(task.train.lengths, BATCH, seed))
    ranges = [p.requires_grad_(learn) for name, p in model.named_parameters() if HOOKS in name]
    weights = [p for name, p in model.named_parameters() if HOOKS not in name]
    groups = [{"params": weights, "rate": 1.0}, {"params": ranges, "rate": rate}]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=LR, weight_decay=0.0, fused=True)
    model.train()
    begun, norms, parts, losses = time.process_time(), [], [], []
    for step in steps:
        factor = learning_rate(step, total=bench.steps, warmup=round(0.06 * bench.steps), schedule="linear")
        for group in optimizer.param_groups:
            group["lr"] = LR * factor * group["rate"]
        batch = task.collate([task.train[i] for i in order[step * BATCH : (step + 1) * BATCH]])
        outputs = model(**batch)
        loss = teacher(batch, outputs, outputs.loss).total
        loss.backward()
        for method in acting_methods:
            method.gradients(True)
        own = [p.grad.square().sum() for p in ranges if p.grad is not None]
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for method in acting_methods:
            method.updated(step + 1)
        norms.append(float(norm))
        parts.append(float(torch.stack(own).sum()) / float(norm) ** 2 if own else 0.0)
        losses.append(float(loss.detach()))
    for p in ranges:
        p.requires_grad_(True)
    return {
        "seconds": time.process_time() - begun,
        "clipped": float(np.mean(np.array(norms) > 1.0)),
        "gradient_of_ranges": float(np.median(parts)),
        "loss": float(np.mean(losses[-20:])),
    }


def methods(before: Before, warmup: int) -> list[Method[Any]]:
    if before.method == "curvature":
        prune: Any = Curvature.model_validate({"method": "curvature", "keep": KEEP})
    else:
        schedule = {"end": warmup, "unit": "step"}
        prune = Fisher.model_validate({"method": "fisher", "keep": KEEP, "schedule": schedule})
    return methods_of([prune, *([QAT] if before.quantized else [])])


def cut(name: str, seed: int, bench: Bench) -> tuple[nn.Module, dict[str, Any]]:
    """The model after the cut, and what is known of it; from --work where it was made before."""
    before, steps, total = BEFORE[name], bench.warmup, bench.steps
    if before.method == "curvature":
        seed = steps = total = 0  # it takes no steps, so that there is one cut for all
    folder = bench.work / f"{name.replace('/', '-')}-{seed}-{total}-{steps}"
    if not (folder / "facts.json").is_file():
        tools = Tools(
            inputs=lambda: bench.task.calibration(SAMPLES.samples, SAMPLES.batch_size),
            labelled=lambda: bench.task.labelled(SAMPLES),
            loss=bench.task.model_loss,
            example=lambda: bench.task.example(1, 128),
            length=128,
            steps=steps,
            steps_per_epoch=max(1, steps),
            lr=LR,
        )
        begun, own = time.process_time(), methods(before, bench.warmup)
        model = prepared(own, artifact.load(bench.dense), tools)
        start = facts.ranges(model)
        found: dict[str, Any] = {"name": f"{name}/{seed}", "before": name, "seed": seed}
        if steps:
            found |= train(model, range(steps), seed, bench, acting(own), learn=before.learn, rate=before.rate)
        learned = facts.ranges(model)
        model = finalized(own, model, tools)
        found["seconds"] = time.process_time() - begun
        pruner: Any = own[0]
        found["kept"] = facts.kept_bits(pruner.pruner.structure, pruner.pruner.kept())
        if before.quantized:
            found["moved"] = facts.ratios(start, learned)
            found["stale"] = facts.ratios(facts.ranges(model), facts.ranges(recalibrated(model, bench)))
        artifact.save(model.eval(), folder / "model", bench.task.processor)
        (folder / "facts.json").write_text(json.dumps(found))
    return artifact.load(folder / "model"), json.loads((folder / "facts.json").read_text())


def recalibrated(model: nn.Module, bench: Bench) -> nn.Module:
    """As `carry: recalibrate` has it, and `start: after_prune`."""
    plain = quantizers.detach(model)[0] if is_quantized(model) else model
    return quantizers.quantize(plain, QAT, bench.task.calibration(SAMPLES.samples, SAMPLES.batch_size))


def run_arm(name: str, arm: Arm, seed: int, bench: Bench) -> tuple[dict[str, Any], dict[str, Any]]:
    """The row of an arm, and that of its cut."""
    model, cut_facts = cut(arm.before, seed, bench)
    before = BEFORE[arm.before]
    at = 0 if before.method == "curvature" else bench.warmup
    begin = bench.late if arm.late else at
    further: Callable[..., dict[str, Any]] = partial(train, rate=before.rate if arm.rate is None else arm.rate)
    begun = time.process_time()
    if begin > at:
        further(model, range(at, begin), seed, bench, [])
    gap = {"float_kl": facts.kl(bench.margins("validation")[:512], margins(model, bench, "validation", 512))}
    if arm.fresh and arm.quantized:
        model = recalibrated(model, bench)
    gap["begin_kl"] = facts.kl(bench.margins("validation")[:512], margins(model, bench, "validation", 512))
    start = facts.ranges(model)
    trained = further(model, range(begin, bench.steps), seed, bench, [])
    seconds = time.process_time() - begun + cut_facts["seconds"]
    row = {"name": f"{name}/{seed}", "arm": name, "seed": seed, **gap, **trained, "seconds": seconds}
    if arm.quantized:
        row["moved"] = facts.ratios(start, facts.ranges(model))
    return row | {"margins": packed(margins(model, bench, "test"))}, cut_facts


def margins(model: nn.Module, bench: Bench, split: str, rows: int | None = None) -> np.ndarray:
    found = logits(model, bench.task, split, rows)
    return found[:, 1] - found[:, 0]


def plan() -> list[tuple[str, Arm, int]]:
    """In the order of what it tells."""
    arms = [(name, arm, seed) for seed in SEEDS[:2] for name, arm in ARMS.items()]
    arms += [(name, arm, SEEDS[0]) for name, arm in MORE.items()]
    arms += [(name, arm, SEEDS[2]) for name, arm in ARMS.items()]
    return arms + [(name, arm, seed) for seed in SEEDS[1:] for name, arm in MORE.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    add_dense(parser)
    parser.add_argument("--steps", type=int, default=128, help="of a stage, at most an epoch")
    parser.add_argument("--only", default="*", help="pattern of ARM/SEED, e.g. 'fisher/*/0'")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no arm after so many minutes")
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.monotonic()
    dense, task = dense_of(options)
    chosen = setting(options.steps)
    bench = Bench(task, dense, options.work / "order", chosen["steps"], chosen["warmup"], chosen["late"])
    if options.steps * BATCH > len(task.train):
        parser.error(f"--steps: at most {len(task.train) // BATCH}, an epoch")
    bench.work.mkdir(parents=True, exist_ok=True)
    bench.teacher()
    result: dict[str, Any] = {"rows": [], "cuts": []}
    if options.json.is_file():
        result = json.loads(options.json.read_text())
    labels = np.array([int(task.test[i]["labels"]) for i in range(len(task.test))])
    result |= {"host": host(), "versions": versions(), "setting": chosen | {"keep": KEEP["encoder_params"]}}
    result["setting"] |= {"calibration": SAMPLES.samples}
    result["dense"] = {"margins": packed(bench.margins("test")), "labels": "".join(map(str, labels))}

    def keep() -> None:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
        options.json.with_suffix(".md").write_text(markdown(result) + "\n")

    for name, arm, seed in plan():
        known = {r["name"] for r in result["rows"]}
        if f"{name}/{seed}" in known or not fnmatch.fnmatch(f"{name}/{seed}", options.only):
            continue
        if time.monotonic() - begun > 60 * options.minutes:
            break
        row, found = run_arm(name, arm, seed, bench)
        right = (unpacked(row["margins"]) > 0) == labels
        shown = {k: v for k, v in row.items() if k not in ("margins", "moved")}
        print(shown | {"accuracy": right.mean(), "wall": time.monotonic() - begun}, flush=True)
        result["rows"].append(row)
        if found["name"] not in {c["name"] for c in result["cuts"]}:
            result["cuts"].append(found)
        if "noise" not in result and seed == SEEDS[0] and name == "fisher/after_prune":
            result["noise"] = facts.noise(bench.dense, task, KEEP, QAT)
        keep()
    keep()


if __name__ == "__main__":
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    main()
