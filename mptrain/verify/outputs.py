"""The outputs that are compared: those that count, by name, in float32, without the rows that are padding."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.core.signature import Signature, by_name, without_cache


def rows(outputs: Any, batch: Mapping[str, Any], signature: Signature | None = None) -> dict[str, Tensor]:
    """Floating outputs as tensors [rows, …] or as they are; the only place that decides what is padding.

    outputs: what a forward or a runtime returned. batch: its inputs. signature: says which outputs count and which
    of them are per token, so that what the mask leaves out is dropped; without one all outputs and rows count.
    Raises ModelError for an output of the signature that is missing.
    """
    found = by_name(_tensors(outputs))
    if signature is not None:
        found = signature.named(found)
    found = {name: value.detach().float() for name, value in found.items() if value.is_floating_point()}
    return {name: value[kept] if (kept := counted(name, batch, signature)) is not None else value
            for name, value in found.items()}  # fmt: skip


@torch.no_grad()
def of_model(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], signature: Signature
) -> list[dict[str, Tensor]]:
    """To each batch the rows of the torch model itself, in eval mode and without a cache."""
    training = model.training
    model.eval()
    try:
        with without_cache(model):
            return [rows(model(**batch), batch, signature) for batch in batches]
    finally:
        model.train(training)


def counted(name: str, batch: Mapping[str, Any], signature: Signature | None) -> Tensor | None:
    """Bool [batch, length], the places of an output that count; None where all do."""
    mask = None if signature is None else signature.mask(name)
    return None if mask is None or mask not in batch else torch.as_tensor(batch[mask]).bool()


def _tensors(outputs: Any) -> Any:
    if not isinstance(outputs, Mapping):
        return outputs
    return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in outputs.items()}
