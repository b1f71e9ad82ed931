"""Names of blocks and of the layers that reports put them in, from the modules that own their parameters.

    bert.encoder.layer.0.attention.{self.query, output.dense}   bert.encoder.layer.0.attention, in bert.encoder.layer.0
    bert.encoder.layer.0.{intermediate.dense, output.dense}     bert.encoder.layer.0.ffn, in bert.encoder.layer.0
    encoder.block.{0, 1}.layer.0.SelfAttention.{q, k, v, o}     encoder.block.*.layer.0.SelfAttention, in encoder.block

A layer is a member of a list of modules of one class.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn


def common(modules: Iterable[str]) -> list[str]:
    """Components that all module names begin with; "*" where they differ in nothing but a number."""
    found = []
    for parts in zip(*(name.split(".") for name in modules)):
        if len(set(parts)) > 1 and not all(part.isdigit() for part in parts):
            break
        found.append(parts[0] if len(set(parts)) == 1 else "*")
    while found and found[-1] == "*":
        found.pop()
    return found


def layer_of(model: nn.Module, modules: Iterable[str]) -> str:
    """The innermost layer that all the modules are in; where they are in several or none, what they have in common."""
    parts = common(modules)
    if "*" in parts:
        return ".".join(parts[: parts.index("*")])
    for end in range(len(parts), 0, -1):
        parent = model.get_submodule(".".join(parts[: end - 1]))
        if parts[end - 1].isdigit() and len({type(child) for child in parent.children()}) == 1:
            return ".".join(parts[:end])
    return ".".join(parts)


def name_of(model: nn.Module, modules: Iterable[str], kind: str) -> str:
    """The common module where that is less than a layer, else the layer and the kind."""
    modules = list(modules)
    name, layer = ".".join(common(modules)), layer_of(model, modules)
    return name if name != layer else ".".join(part for part in (layer, kind) if part)


def layers_of(model: nn.Module, names: Iterable[str], prefix: str = "") -> list[str]:
    """The layers that hold the modules `names`, in the order of modules; empty for a model without a list of layers.

    A list within a layer (the blocks of a stage) counts instead of it when it holds most of what the layer does.
    """
    found: list[str] = []
    for name, child in model.named_children():
        path = f"{prefix}{name}"
        mine = [n for n in names if n.startswith(f"{path}.")]
        if not mine:
            continue
        if not isinstance(child, nn.ModuleList) or len({type(member) for member in child}) > 1:
            found += layers_of(child, mine, f"{path}.")
            continue
        for index, member in child.named_children():
            layer = f"{path}.{index}"
            held = [n for n in mine if n.startswith(f"{layer}.")]
            inner = layers_of(member, held, f"{layer}.")
            inside = sum(any(n.startswith(f"{one}.") for one in inner) for n in held)
            found += inner if 2 * inside > len(held) else [layer] if held else []
    return found
