"""The table of methods: which class does what the settings of a stage ask for. Light; a method is imported when used.

A line is added by `mptrain.extend.register_method` for methods outside this package.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mptrain.recipe.adapters import Lora
from mptrain.recipe.method import MethodConfig
from mptrain.recipe.prune import Curvature, Fisher, Magnitude, Movement
from mptrain.recipe.tables import Palettize
from mptrain.recipe.vocabulary import Vocabulary
from mptrain.recipe.weights import Ptq, Qat, WeightOnly

if TYPE_CHECKING:
    from torch import nn

    from mptrain.compress.base import Method, Tools, TrainingMethod

METHODS: dict[type[MethodConfig], str] = {
    Movement: "mptrain.compress.prune.methods:MovementPruning",
    Fisher: "mptrain.compress.prune.methods:FisherPruning",
    Magnitude: "mptrain.compress.prune.methods:MagnitudePruning",
    Curvature: "mptrain.compress.prune.methods:CurvaturePruning",
    Qat: "mptrain.compress.quantize.methods:Quantization",
    Ptq: "mptrain.compress.quantize.methods:Quantization",
    WeightOnly: "mptrain.compress.weights.methods:WeightOnlyQuantization",
    Palettize: "mptrain.compress.weights.methods:Palettization",
    Vocabulary: "mptrain.compress.vocabulary.methods:VocabularyCut",
    Lora: "mptrain.compress.adapters.methods:LowRankAdapters",
}


def method_class(config: MethodConfig) -> type[Method[Any]]:
    """The method of some settings."""
    module, _, name = METHODS[type(config)].partition(":")
    return getattr(import_module(module), name)


def methods_of(configs: Iterable[MethodConfig]) -> list[Method[Any]]:
    """A method for each of the settings, in their order at a boundary."""
    return sorted((method_class(config)(config) for config in configs), key=lambda method: method.order)


def prepared(methods: Sequence[Method[Any]], model: nn.Module, tools: Tools) -> nn.Module:
    """A phase begins; the model may be another object. methods: of `methods_of`."""
    for method in reversed(methods):
        model = method.prepare(model, tools)
    return model


def stand_still(configs: Iterable[MethodConfig], model: nn.Module, still: bool = True) -> None:
    """Before a phase trains: what the methods of its stage leave alone. still: False after it."""
    for method in methods_of(configs):
        for parameter in method.still(model):
            parameter.requires_grad_(not still)


def acting(methods: Sequence[Method[Any]]) -> list[TrainingMethod]:
    """Those that act in the steps of a phase that has begun."""
    return [found for method in methods if (found := method.training()) is not None]


def finalized(methods: Sequence[Method[Any]], model: nn.Module, tools: Tools) -> nn.Module:
    """A phase ends; the model may be another object."""
    for method in methods:
        model = method.finalize(model, tools)
    return model
