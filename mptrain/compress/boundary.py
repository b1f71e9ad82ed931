"""The boundary after a warm-up: what is masked is cut for good, and quantizers follow.

    resolve      survivors dense again, the units that stay from masks or scores
    detach       fake quantizers come off, SmoothQuant's factors go into the weights
    refit        what stays is changed so that layers change least: by a method that knows how, or by rescale.py
    shrink       rows, columns and units leave the model
    attach       the quantizers are back, per-channel ranges sliced: the shrunk model computes what the masked one did

A run does this at the end of a phase, a script of your own between two trainings: it is the same function.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Protocol

from torch import Tensor, nn

from mptrain.compress.prune import rescale
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure.blocks import Kept, Structure
from mptrain.compress.structure.shrink import shrink, slices_of
from mptrain.core.hooks import is_quantized


class Resolvable(Protocol):
    """A pruner, as far as a boundary knows it."""

    structure: Structure

    def restore_dense(self) -> None: ...

    def kept(self) -> Kept: ...

    def refit(self, model: nn.Module, kept: Kept) -> None:
        """Change the dense model's weights that stay, in place; most methods leave them as they are."""
        ...


def cut(model: nn.Module, pruner: Resolvable, refit: Iterable[dict[str, Tensor]] | None = None) -> nn.Module:
    """The model that `pruner` acted on, without what it masks; another object where there are quantizers.

    model: as training left it, the one that the pruner was prepared on, out of its DDP wrap. refit: model inputs on
    which the kept columns are refitted to the dense layer's outputs. Raises ModelError for a model that is not the
    pruner's.
    """
    pruner.restore_dense()
    kept, structure = pruner.kept(), pruner.structure

    def change(plain: nn.Module) -> None:
        pruner.refit(plain, kept)
        if refit is not None:
            rescale.refit(plain, structure, kept, refit)

    return without(model, structure, kept, change)


def without(
    model: nn.Module, structure: Structure, kept: Kept, change: Callable[[nn.Module], None] = lambda plain: None
) -> nn.Module:
    """The model with `kept` alone, in place, or another object where there are quantizers, which follow.

    change: what is done to the dense weights, in place, while the quantizers are off.
    """
    quantized = is_quantized(model)
    if quantized:
        model, config, tensors = quantizers.detach(model)
    change(model)
    slices = slices_of(structure, kept)
    shrink(model, structure, kept)
    return quantizers.attach(model, *quantizers.slice_quantizers(config, tensors, slices)) if quantized else model
