"""Made-up measurements of a plausible run, for the tests of the report. None of these numbers was measured."""

from __future__ import annotations

from typing import Any

import numpy as np

from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.recipe import Recipe
from mptrain.report.build import Variant, build

N = 2553
TIMES = {"b1_s32": 3.9, "b1_s128": 11.8, "b8_s32": 22.4, "b8_s128": 92.0}


def recipe(**changes: Any) -> Recipe:
    content: dict[str, Any] = {
        "schema": "mptrain/v1",
        "name": "jpqd-bert",
        "description": "Prune, quantize and distil BERT jointly on film reviews.",
        "model": {"path": "packaged:minilm", "task": "text-classification"},
        "data": {"source": "packaged:film-reviews"},
        "stages": [
            {"id": "dense", "train": {"epochs": 2, "lr": 1e-4}},
            {
                "id": "jpqd",
                "train": {"epochs": 2, "lr": 2e-5},
                "teacher": "dense",
                "prune": {"method": "fisher", "keep": {"encoder_params": 0.45}, "schedule": {"end": 1}},
                "quantize": {"mode": "qat"},
                "distill": {"weight": 0.9},
            },
        ],
        "export": [
            {
                "id": "ov",
                "format": "openvino",
                "of": ["dense", "jpqd"],
                "precision": ["fp32", "int8", "int8_emb4"],
            }
        ],
        "gates": {"max_drop": 0.01, "min_size_ratio": 5.24, "min_speedup": {"b1_s128_t1": 1.8}},
        "output": {"dir": "runs/jpqd-bert"},
    }
    return Recipe.model_validate({**content, **changes})


def score(right: float, seed: int, like: Score | None = None, disagree: float = 0.06) -> Score:
    """0/1 accuracy near `right`; with `like`, equal to it except on a fraction `disagree`."""
    rng = np.random.default_rng(seed)
    hits = rng.random(N) < right
    if like is not None:
        hits = np.where(rng.random(N) < disagree, hits, like.stats[:, 0] == 1)
    return Score("accuracy", hits.astype(np.float64)[:, None], MEAN)


def times(factor: float, seed: int) -> dict[str, dict[str, float | int]]:
    rng = np.random.default_rng(seed)
    found: dict[str, dict[str, float | int]] = {}
    for key, milliseconds in TIMES.items():
        for threads, scale in (("1", 1.0), ("all", 0.56)):
            median = milliseconds * scale / factor * rng.uniform(0.97, 1.03)
            found[f"{key}_t{threads}"] = {"median": median, "min": 0.95 * median, "runs": 15}
    return found


def linears(layers: int = 6) -> list[str]:
    parts = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    parts += ("intermediate.dense", "output.dense")
    return [f"bert.encoder.layer.{i}.{part}" for i in range(layers) for part in parts]


def ir(variant: str) -> str:
    return f"export/{variant}/openvino_model.xml"


def variants(int8_speed: float = 1.95) -> list[Variant]:
    base = score(0.83, 1)
    runtime = {"fused_attention": 6, "attention_layers": 6, "inference_precision": "f32"}
    plain = {**runtime, "int8_layers": [], "fp32_layers": linears()}
    int8 = {**runtime, "int8_layers": linears(), "fp32_layers": ["bert.pooler.dense", "classifier"]}
    exact = {"max_abs_diff": 2.4e-6, "mean_abs_diff": 3e-7, "agreement": 1.0, "examples": 128}
    close = {"max_abs_diff": 0.17, "mean_abs_diff": 0.02, "agreement": 0.992, "examples": 128}
    return [
        Variant("baseline_fp32", "dense", "openvino", "fp32", ir("baseline_fp32"), 90_860_000, 22_713_986,
                [base], 1_360_000_000, times(1.0, 1), {**plain, "weight_types": {"f32": 90_700_000}}, exact),
        Variant("pruned_fp32", "jpqd", "openvino", "fp32", ir("pruned_fp32"), 65_300_000, 16_301_000,
                [score(0.82, 2, base)], 560_000_000, times(2.3, 2), {**plain, "weight_types": {"f32": 65_100_000}},
                exact),
        Variant("jpqd_int8", "jpqd", "openvino", "int8", ir("jpqd_int8"), 17_100_000, 16_301_000,
                [score(0.815, 3, base)], 560_000_000, times(int8_speed, 3),
                {**int8, "weight_types": {"i8": 16_290_000, "f32": 410_000}}, close),
        Variant("jpqd_int8_emb4", "jpqd", "openvino", "int8_emb4", ir("jpqd_int8_emb4"), 11_200_000, 16_301_000,
                [score(0.812, 4, base)], 560_000_000, times(int8_speed, 4),
                {**int8, "weight_types": {"i8": 4_570_000, "u4": 5_860_000, "f32": 410_000}}, close),
    ]  # fmt: skip


def history(steps: int = 560, log_steps: int = 1) -> list[dict[str, Any]]:
    rng = np.random.default_rng(0)
    rows: list[dict[str, Any]] = []
    for stage in ("dense", "jpqd"):
        for step in range(log_steps, steps + 1, log_steps):
            phase = "train" if stage == "dense" else "warmup" if step <= steps // 2 else "finetune"
            row: dict[str, Any] = {"stage": stage, "phase": phase, "step": step, "lr": 1e-4 * (1 - step / steps)}
            row["loss"] = float(0.3 + 0.4 * np.exp(-4 * step / steps) + rng.normal(0, 0.03))
            if stage == "jpqd":
                row["task_loss"] = row["loss"] * 1.3
                row["distill_loss"] = row["loss"] * 0.6
                if phase == "warmup":
                    row["compress/sparsity"] = 0.55 * (1 - (1 - step / (steps // 2)) ** 3)
            rows.append(row)
            if step % (steps // 2) == 0:
                accuracy = 0.8 + 0.02 * step / steps
                rows.append({"stage": stage, "phase": phase, "step": step, "eval/accuracy": accuracy})
    return rows


def structure(layers: int = 6) -> dict[str, Any]:
    rng = np.random.default_rng(5)
    rows = []
    for i in range(layers):
        heads = sorted(int(h) for h in rng.choice(12, size=rng.integers(3, 10), replace=False))
        ffn = int(rng.integers(20, 100)) * 8
        rows.append(
            {
                "layer": f"bert.encoder.layer.{i}",
                "heads": heads,
                "heads_total": 12,
                "ffn": ffn,
                "ffn_total": 1536,
                "params": len(heads) * 49_152 + ffn * 768,
                "params_total": 12 * 49_152 + 1536 * 768,
            }
        )
    return {"family": "bert", "layers": rows}


def host(flags: tuple[str, ...] = ("avx2", "fma", "f16c")) -> dict[str, Any]:
    return {
        "cpu": "AMD EPYC 7571",
        "cpu_flags": list(flags),
        "cores": 2,
        "cores_usable": 2,
        "ram_bytes": 8 * 2**30,
        "os": "Linux-6.1-x86_64",
        "machine": "x86_64",
        "python": "3.11.7",
    }


def restored() -> dict[str, Any]:
    scores = {"metric": "accuracy", "unit": "fraction", "n": 1273, "float": 0.85, "int8": 0.81, "found": 0.849}
    return {**scores, "limit": 0.002, "drop": 0.001, "units": 38, "evaluations": 9, "ignore": ["pooler", "classifier"]}


def report(**changes: Any) -> dict[str, Any]:
    """The whole report; `changes` replace arguments of `build`."""
    arguments: dict[str, Any] = {
        "recipe": recipe(),
        "versions": {"mptrain": "0.1.0", "torch": "2.13.0", "transformers": "5.5.4", "openvino": "2026.4.0"},
        "host": host(),
        "wall_s": {"inputs": 9.1, "dense": 301.5, "jpqd": 402.2, "export": 51.0, "evaluate": 70.3, "total": 834.1},
        "variants": variants(),
        "floor": score(0.76, 9),
        "history": history(),
        "methods": {"jpqd": {"prune": {"structure": structure()}, "quantize": {"restored": restored()}}},
        "data_facts": {
            "source": "packaged:film-reviews",
            "rows": {"train": 8926, "validation": 1273, "test": N},
            "duplicates_dropped": 56,
            "grouped_by": "film",
            "labels": {"test": {"rotten": N // 2, "fresh": N - N // 2}},
        },
        "checkpoints": {"dense": "stages/dense/model", "jpqd": "stages/jpqd/model"},
        **changes,
    }
    return build(arguments.pop("recipe"), **arguments)
