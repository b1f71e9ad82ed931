"""The table of methods: which class does what the settings of a stage ask for. Light; a method is imported when used.

A line is added by `mptrain.extend.register_method` for methods outside this package.
"""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module
from typing import TYPE_CHECKING, Any

from mptrain.recipe.method import MethodConfig
from mptrain.recipe.prune import Curvature, Fisher, Magnitude, Movement
from mptrain.recipe.weights import Palettize, Ptq, Qat, WeightOnly

if TYPE_CHECKING:
    from mptrain.compress.base import Method

METHODS: dict[type[MethodConfig], str] = {
    Movement: "mptrain.compress.prune.methods:MovementPruning",
    Fisher: "mptrain.compress.prune.methods:FisherPruning",
    Magnitude: "mptrain.compress.prune.methods:MagnitudePruning",
    Curvature: "mptrain.compress.prune.methods:CurvaturePruning",
    Qat: "mptrain.compress.quantize.methods:Quantization",
    Ptq: "mptrain.compress.quantize.methods:Quantization",
    WeightOnly: "mptrain.compress.weights.methods:WeightOnlyQuantization",
    Palettize: "mptrain.compress.weights.methods:Palettization",
}


def method_class(config: MethodConfig) -> type[Method[Any]]:
    """The method of some settings."""
    module, _, name = METHODS[type(config)].partition(":")
    return getattr(import_module(module), name)


def methods_of(configs: Iterable[MethodConfig]) -> list[Method[Any]]:
    """A method for each of the settings, in their order at a boundary."""
    return sorted((method_class(config)(config) for config in configs), key=lambda method: method.order)
