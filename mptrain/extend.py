"""Members of your own, without a change to this package: call these before a recipe is read.

    register_format(Npz, "my_format:NpzFormat")     then a recipe may say `export: [{format: npz, …}]`
    register_method(Ternary, "my_method:Ternarization") then a stage may say `quantize: {mode: ternary, …}`
    register_task(SORTING, "my_task:Sorting")       then a recipe may say `model: {task: sorting, …}`
    register_structure("Gated", blocks)             then `prune` cuts the blocks of models of that class

docs/extend.md walks through each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from mptrain.compress import methods
from mptrain.core.errors import UserError
from mptrain.export.formats import FORMATS
from mptrain.recipe import EXPORTS, METHODS, TASKS, ExportSpec, MethodConfig, Recipe, Stage, TaskSpec

if TYPE_CHECKING:
    from torch import nn

    from mptrain.compress.structure.blocks import Block


def register_format(spec: type[ExportSpec], implementation: str) -> None:
    """Add an export format under the name in its field `format: Literal[name]`.

    spec: its entry in a recipe and all that is known of it without running it. implementation: "package.module:Class"
    of its `mptrain.export.base.Format`, imported when it is used; the class is called with the entry. Raises
    UserError for a name that another format has.
    """
    name = spec.name()
    if EXPORTS.get(name, spec) is not spec:
        raise UserError(f"register_format: the name {name!r} is that of {EXPORTS[name].__name__}; give another")
    EXPORTS[name], FORMATS[name] = spec, implementation
    Recipe.model_rebuild(force=True)


def register_task(spec: TaskSpec, implementation: str) -> None:
    """Add a task under its name.

    spec: all that is known of it without data. implementation: "package.module:Class" of its
    `mptrain.data.tasks.base.Task`, imported when it is used, whose `kind` is the spec. Raises UserError for a name
    that another task has.
    """
    row = replace(spec, home=implementation)
    if TASKS.setdefault(spec.name, row) != row:
        raise UserError(f"register_task: the name {spec.name!r} is that of {TASKS[spec.name].home}; give another")


def register_method(config: type[MethodConfig], implementation: str) -> None:
    """Add a method under the names in its field `mode` (of quantize) or `method` (of prune and palettize).

    config: its settings in a stage and all that is known of it without a model, a subclass of
    `mptrain.recipe.PruneConfig`, `QuantizeConfig` or `PalettizeConfig`, which says in what field of a stage it stands.
    implementation: "package.module:Class" of its `mptrain.compress.base.Method`, imported when it is used. Raises
    UserError for a name that another method of the field has.
    """
    members = METHODS[config.field]
    for name in config.names():
        if members.get(name, config) is not config:
            other = members[name].__name__
            raise UserError(f"register_method: the name {name!r} of {config.field} is that of {other}; give another")
    members.update(dict.fromkeys(config.names(), config))
    methods.METHODS[config] = implementation
    Stage.model_rebuild(force=True)
    Recipe.model_rebuild(force=True)


def register_structure(model_class: str, blocks: Callable[[nn.Module], Iterable[Block]]) -> None:
    """Say what can be cut out of models of a class.

    model_class: the name of the class. blocks: makes them of a model, dense or already shrunk
    (`mptrain.compress.structure.by_hand.block`). These alone count then, not what mptrain finds by itself. Raises
    UserError for a class whose blocks another function gives.
    """
    from mptrain.compress.structure.find import BY_HAND

    if BY_HAND.setdefault(model_class, blocks).__qualname__ != blocks.__qualname__:
        raise UserError(f"register_structure: the blocks of {model_class!r} are given already; give another class")
