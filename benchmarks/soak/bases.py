"""Whole recipes on tiny models and data, for dry runs to be broken: one of every task and of every weight method."""

from __future__ import annotations

from pathlib import Path

import yaml
from kit import tiny, tiny_tasks


def make(folder: Path) -> list[str]:
    """Texts of recipes that pass a dry run; their models and data are below `folder`."""
    (folder / "reviews").mkdir(parents=True)
    found = [tiny.jpqd(folder / "reviews")]
    found += [tiny_tasks.recipe(task, folder / task) for task in tiny_tasks.CASES]
    compressed = tiny_tasks.recipe("causal-lm", folder / "compressed")
    compressed["stages"] = [
        compressed["stages"][0],
        {"id": "int4", "quantize": {"mode": "weight_only", "method": "gptq", "block_size": 16}},
        {"id": "tables", "from": "dense", "palettize": {"method": "skm", "bits": 3, "group_size": 8}},
    ]
    compressed["export"] = [
        {"id": "ov", "format": "openvino", "of": ["dense", "int4"], "precision": ["fp32", "compressed"]},
        {"id": "ml", "format": "coreml", "of": ["tables"], "minimum_deployment_target": "iOS18"},
    ]
    return [yaml.safe_dump(recipe, sort_keys=False) for recipe in [*found, compressed]]
