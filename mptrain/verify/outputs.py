"""The outputs that are compared: those that count, by name, in float32, without the rows that are padding."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.core.signature import Signature, by_name, without_cache

KEPT = 384 * 2**20
"""bytes of outputs to keep of many batches: the logits of a language model are 25 MB for 128 tokens"""


class Kept(Sequence[dict[str, Tensor]]):
    """Outputs by batch, made by `make` when they are asked for; those used last stay, up to KEPT bytes of them.

    make: gives the same for a batch whenever it is called.
    """

    def __init__(self, make: Callable[[int], dict[str, Tensor]], count: int) -> None:
        self._make, self._count = make, count
        self._known: OrderedDict[int, dict[str, Tensor]] = OrderedDict()

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> dict[str, Tensor]: ...
    @overload
    def __getitem__(self, index: slice) -> list[dict[str, Tensor]]: ...
    def __getitem__(self, index: int | slice) -> dict[str, Tensor] | list[dict[str, Tensor]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not 0 <= index < self._count:
            raise IndexError(index)
        if index not in self._known:
            self.keep(index, self._make(index))
        self._known.move_to_end(index)
        return self._known[index]

    def keep(self, index: int, outputs: dict[str, Tensor]) -> None:
        """outputs: what `make` would give."""
        self._known[index] = outputs
        while len(self._known) > 1 and sum(map(_bytes, self._known.values())) > KEPT:
            self._known.popitem(last=False)


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
    return {name: _counting(value, counted(name, batch, signature)) for name, value in found.items()}


def of_model(
    model: nn.Module, batches: Sequence[Mapping[str, Tensor]], signature: Signature
) -> Sequence[dict[str, Tensor]]:
    """To each batch the rows of the torch model itself, in eval mode and without a cache; see Kept. The model must
    stay as it is as long as they are asked for."""

    @torch.no_grad()
    def make(index: int) -> dict[str, Tensor]:
        training = model.training
        model.eval()
        try:
            with without_cache(model):
                return rows(signature.call(model, batches[index]), batches[index], signature)
        finally:
            model.train(training)

    return Kept(make, len(batches))


def counted(name: str, batch: Mapping[str, Any], signature: Signature | None) -> Tensor | None:
    """Bool [batch, length], the places of an output that count; None where all do."""
    mask = None if signature is None else signature.mask(name)
    return None if mask is None or mask not in batch else torch.as_tensor(batch[mask]).bool()


def _counting(value: Tensor, kept: Tensor | None) -> Tensor:
    """The rows that count; without a copy where all do."""
    if kept is None:
        return value
    whole = value.shape[: kept.dim()] == kept.shape and bool(kept.all())
    return value.flatten(0, kept.dim() - 1) if whole else value[kept]


def _bytes(outputs: Mapping[str, Tensor]) -> int:
    return sum(value.numel() * value.element_size() for value in outputs.values())


def _tensors(outputs: Any) -> Any:
    if not isinstance(outputs, Mapping):
        return outputs
    return {name: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for name, v in outputs.items()}
