"""What order.py looks at beside accuracy: ranges of quantizers, which units stay, how far the teacher is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from mptrain.compress.prune.fisher import FisherPruner
from mptrain.compress.quantize import quantizers
from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.structure.blocks import Kept, Structure
from mptrain.compress.structure.find import find_structure
from mptrain.core.hooks import is_quantized
from mptrain.data.load import Task
from mptrain.models import artifact
from mptrain.recipe import Calibration, Fisher, Qat

Ranges = dict[str, dict[str, np.ndarray]]
"""kind (weights, activations) -> name of the quantizer -> its largest values"""


def ranges(model: nn.Module) -> Ranges:
    """Empty for a model without quantizers."""
    found: Ranges = {"weights": {}, "activations": {}}
    if is_quantized(model):
        for name, module in model.named_modules():
            if isinstance(module, FakeQuantizer) and module.symmetric:
                kind = "activations" if module.weight_of is None else "weights"
                found[kind][name] = module.scale.detach().abs().flatten().double().numpy().copy()
    return found


def ratios(before: Ranges, after: Ranges) -> dict[str, dict[str, float]]:
    """How far ranges lie apart, in percent of `after`: the 10th, 50th and 90th percentile of before/after - 1, and the
    share that is off by more than a tenth."""
    found = {}
    for kind, quantizers_before in before.items():
        if not quantizers_before:
            continue
        pairs = [(values, after[kind][name]) for name, values in quantizers_before.items()]
        off = np.concatenate([a / np.maximum(b, 1e-12) - 1 for a, b in pairs])
        low, middle, high = (100 * float(p) for p in np.percentile(off, [10, 50, 90]))
        found[kind] = {"p10": low, "p50": middle, "p90": high, "over_10": float(np.mean(np.abs(off) > 0.1))}
    return found


def kept_bits(structure: Structure, kept: Kept) -> dict[str, str]:
    """Which units of each block stay, as hexadecimal bits, the first unit the highest; behind it their number."""
    found = {}
    for block in structure.prunable():
        stays = set(kept.of(block))
        bits = "".join(str(int(i in stays)) for i in range(block.units))
        found[block.name] = f"{int(bits, 2):x}/{block.units}"
    return found


def overlap(one: dict[str, str], other: dict[str, str]) -> dict[str, float]:
    """Units that both keep, in parts of those that one keeps (the mean of both ways): of heads, and of channels."""
    kinds: dict[str, list[np.ndarray]] = {}
    for name, bits in one.items():
        value, units = bits.split("/")
        kind = "heads" if int(units) < 64 else "channels"
        pair = [f"{int(v, 16):0{units}b}" for v in (value, other[name].split("/")[0])]
        kinds.setdefault(kind, []).append(np.array([[b == "1" for b in bits] for bits in pair]))
    found = {}
    for kind, parts in kinds.items():
        a, b = np.concatenate(parts, axis=1)
        found[kind] = float((a & b).sum() * (1 / a.sum() + 1 / b.sum()) / 2)
    return found


def kl(teacher: np.ndarray, student: np.ndarray) -> float:
    return float(divergences(teacher, student).mean())


def divergences(teacher: np.ndarray, student: np.ndarray) -> np.ndarray:
    """KL(teacher || student) in nats of each example, of two classes by their margins (log odds)."""
    t, s = teacher.astype(np.float64), student.astype(np.float64)
    p = 1 / (1 + np.exp(-t))
    # log sigmoid, without overflow
    positive = np.logaddexp(0, -s) - np.logaddexp(0, -t)
    negative = np.logaddexp(0, s) - np.logaddexp(0, t)
    return p * positive + (1 - p) * negative


def noise(dense: Path, task: Task, keep: dict[str, float], qat: Qat) -> dict[str, Any]:
    """Fisher's scores of the dense model on training reviews, with quantizers and without: how alike they rank units
    (Spearman, mean over blocks) and which they would keep. Beside it the same of two halves of the reviews, without
    quantizers: what a draw of the reviews changes."""
    batches = task.labelled(Calibration(samples=512, batch_size=32))
    plain = [task.without_targets(batch) for batch in batches]
    float_model = artifact.load(dense)
    halves = [batches[::2], batches[1::2]]
    scores = [_scores(float_model, half, keep) for half in halves]
    rounded = _scores(quantizers.quantize(float_model, qat, plain), halves[0], keep)
    pairs = {"quantizers": (scores[0], rounded), "reviews": (scores[0], scores[1])}
    return {name: _alike(*pair) for name, pair in pairs.items()}


def _scores(model: nn.Module, batches: list[Any], keep: dict[str, float]) -> tuple[dict[str, np.ndarray], Any]:
    """Importances by block, and the kept units as `kept_bits`."""
    structure = find_structure(model)
    config = Fisher.model_validate({"method": "fisher", "keep": keep, "schedule": {"end": 0}})
    pruner = FisherPruner(config, structure=structure, phase_steps=0, steps_per_epoch=1)
    pruner.prepare(model)
    pruner.collect(model, batches)
    # by the importances alone, as a warm-up does; at once, units are also traded in pairs
    return dict(pruner.importance()), kept_bits(structure, pruner.budget.search(pruner.importance()))


def _alike(one: tuple[Any, Any], other: tuple[Any, Any]) -> dict[str, Any]:
    ranks = [np.corrcoef(_ranks(one[0][n]), _ranks(other[0][n]))[0, 1] for n in one[0]]
    return {"spearman": float(np.mean(ranks)), "kept": overlap(one[1], other[1])}


def _ranks(values: np.ndarray) -> np.ndarray:
    return np.argsort(np.argsort(values))
