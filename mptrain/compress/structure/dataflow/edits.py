"""Integer attributes of modules that count units and must fall when units go: candidates for the proof to choose from.

A candidate is an attribute, on the way from a changed parameter's module up to what all modules of the block share,
whose value is the number of units, of query heads, or the width of all units together; in all blocks whose modules of
that class have it, so that no number of a layer is taken for one of heads.

    read while the model ran        a choice: the proof tells which of them must change
    not read, but unmistakable      it changes too: other paths (a cache, another kernel, other versions) may read it
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

from torch import nn

from mptrain.compress.structure import attributes
from mptrain.compress.structure.blocks import Block, Edit
from mptrain.compress.structure.dataflow.record import counts

Key = tuple[str, str]
"""(class of the module, attribute): edited in all blocks or in none"""


@dataclass
class Candidates:
    """always: edits of each block that do not depend on a proof. open: those that do, by block and key. doubtful: keys
    of these whose number may as well be another.
    """

    always: dict[str, list[Edit]] = field(default_factory=lambda: defaultdict(list))
    open: dict[str, dict[Key, list[Edit]]] = field(default_factory=lambda: defaultdict(dict))
    doubtful: dict[str, set[Key]] = field(default_factory=lambda: defaultdict(set))

    def likely(self, name: str) -> frozenset[Key]:
        """Open keys of a block, without the doubtful ones."""
        return frozenset(self.open[name]) - self.doubtful[name]


def candidates(model: nn.Module, blocks: Iterable[Block], read: set[tuple[str, str]]) -> Candidates:
    """read: (module, attribute) of `record.Reads`."""
    blocks, modules = list(blocks), dict(model.named_modules())
    counted: dict[Key, set[str]] = defaultdict(set)
    has: dict[Key, set[str]] = defaultdict(set)
    edits: dict[tuple[str, Key], list[Edit]] = defaultdict(list)
    for block in blocks:
        fixed = {(edit.module, edit.attribute) for edit in block.edits}
        for path in _between(block):
            for attribute in _attributes(modules[path], path, read):
                key = (type(modules[path]).__qualname__, attribute)
                has[key].add(path)
                found = _edits(modules[path], path, attribute, block)
                if found and (path, attribute) not in fixed:
                    counted[key].add(path)
                    edits[block.name, key] += found
    result = Candidates()
    for (name, key), found in edits.items():
        block = next(block for block in blocks if block.name == name)
        doubtful = counted[key] != has[key] or any(_mistakable(model, edit, block) for edit in found)
        if any((edit.module, edit.attribute) in read for edit in found):
            result.open[name][key] = found
            if doubtful:
                result.doubtful[name].add(key)
        elif not doubtful:
            result.always[name] += found
    return result


def _between(block: Block) -> list[str]:
    """Modules from what all the block's modules share down to each of them."""
    owners = dict.fromkeys(axis.parameter.rpartition(".")[0] for axis in block.axes)
    parts = [owner.split(".") for owner in owners]
    shared = 0
    while all(len(p) > shared for p in parts) and len({p[shared] for p in parts}) == 1:
        shared += 1
    paths = {".".join(p[:end]) for p in parts for end in range(shared, len(p) + 1)}
    return sorted(paths - {""})


def _attributes(module: nn.Module, path: str, read: set[tuple[str, str]]) -> list[str]:
    own = [name for name, value in vars(module).items() if not name.startswith("_") and counts(value)]
    config = [name for where, name in sorted(read) if where == path and name.startswith(attributes.CONFIG)]
    return own + config


def _edits(module: nn.Module, path: str, attribute: str, block: Block) -> list[Edit]:
    value = attributes.read(module, attribute)
    several = isinstance(value, list | tuple)
    found = []
    for item, number in enumerate(value if several else [value]):
        if number in _totals(block):
            found.append(Edit(path, attribute, number // block.units, item if several else None))
    return found


def _totals(block: Block) -> set[int]:
    """What all units together are: their number, the query heads, their width in a matrix."""
    widths = {axis.indices.size for axis in block.axes}
    return {block.units, block.units * max(1, block.heads), *widths}


def _mistakable(model: nn.Module, edit: Edit, block: Block) -> bool:
    """Whether it may as well be the size of one unit, or heads to a unit."""
    value = attributes.read(model.get_submodule(edit.module), edit.attribute, edit.item)
    return value in {
        block.heads,
        *(axis.per_unit for axis in block.axes),
        *(axis.per_unit // max(1, block.heads) for axis in block.axes),
    }
