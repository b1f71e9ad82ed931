"""Whether an exported model computes what the torch model computes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.core.errors import ExportError
from mptrain.core.signature import Batch, Outputs
from mptrain.data.tasks.agreement import decisions

Agreement = Callable[[Outputs, Outputs, Batch], np.ndarray]
"""(expected, got, inputs) to a number in 0..1 for each decision"""
Forward = Callable[[Mapping[str, Tensor]], Mapping[str, np.ndarray]]


@torch.no_grad()
def compare(
    model: nn.Module, runner: Forward, batches: Iterable[Mapping[str, Tensor]], agreement: Agreement | None = None
) -> dict[str, Any]:
    """Differences over all outputs of all batches.

    model: torch model, evaluated as it is on its device. runner: the exported model, a function from
    inputs by name to arrays by name. batches: inputs without labels, padded. agreement: of the task, default
    whether the argmax of the last axis is the same, or, of outputs without one, the order of the examples.
    Returns {"max_abs_diff", "mean_abs_diff", "agreement", "examples"}. Positions that the attention mask leaves out
    are not compared. For quantized models agreement says more than the differences.
    Raises ExportError when an output has another shape or values that are not finite.
    """
    device = next(model.parameters()).device
    training = model.training
    model.eval()
    largest = total = 0.0
    values = examples = 0
    alike: list[np.ndarray] = []
    for batch in batches:
        ours = model(**{name: value.to(device) for name, value in batch.items()})
        theirs = runner(batch)
        whole = {name: ours[name].float().cpu().numpy() for name in theirs}
        for name, array in theirs.items():
            expected = whole[name]
            if array.shape != expected.shape:
                raise ExportError(f"output {name}: the exported model gives {array.shape}, the model {expected.shape}")
            kept = _kept(expected, batch)
            bad = int((~np.isfinite(array[kept])).sum())
            if bad:
                raise ExportError(
                    f"output {name}: {bad} of {array[kept].size} values of the exported model are not finite"
                )
            difference = np.abs(array.astype(np.float64) - expected)[kept]
            largest = max(largest, float(difference.max(initial=0.0)))
            total += float(difference.sum())
            values += difference.size
            if agreement is None:
                alike.append(decisions({name: expected[kept]}, {name: array[kept]}))
        if agreement is not None:
            alike.append(agreement(whole, theirs, dict(batch)))
        examples += len(next(iter(batch.values())))
    model.train(training)
    return {
        "max_abs_diff": largest,
        "mean_abs_diff": total / max(values, 1),
        "agreement": float(np.concatenate(alike).mean()) if any(map(len, alike)) else 0.0,
        "examples": examples,
    }


def _kept(output: np.ndarray, batch: Mapping[str, Tensor]) -> np.ndarray:
    """Bool over the leading axes: [batch, length] for outputs with a length that has a mask, else [batch]."""
    mask = batch.get("attention_mask")
    if mask is not None and output.ndim > 1 and output.shape[:2] == tuple(mask.shape):
        return mask.cpu().numpy().astype(bool)
    return np.ones(output.shape[0], dtype=bool)
