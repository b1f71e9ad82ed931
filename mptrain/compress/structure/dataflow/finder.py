"""Finding what can be cut out of a model from what it computes: no names of modules, no list of architectures.

    1. one real forward pass on the CPU is recorded, operation by operation             record.py, stand_in.py
    2. every number gets the label of the parameter's index that made it; labels that
       meet in one number can only be cut together                                      labels.py, rules.py, products.py
    3. classes of labels are units, alike units are blocks, with what goes along        group.py
    4. attributes that count units are looked for on the way                            edits.py
    5. each block is cut by half and must compute what it computes masked; one that
       does not is left out, with the reason                                            proof.py

Left whole, with the reason, where there is attention: convolutions in front of it and what is in no layer (heads of
tasks, poolers). Everywhere: two matrices with nothing between them (adapters, low ranks) and modules whose code holds
a fixed width (nn.MultiheadAttention).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
from torch import Tensor, nn

from mptrain.compress.structure import fields, saved
from mptrain.compress.structure.blocks import Axis, Block, Edit, Kind, Refusal, Role
from mptrain.compress.structure.by_hand import fixed_params
from mptrain.compress.structure.dataflow import examples, proof
from mptrain.compress.structure.dataflow.edits import Candidates, Key, candidates
from mptrain.compress.structure.dataflow.group import Group, Place, Single, group
from mptrain.compress.structure.dataflow.labels import Labels
from mptrain.compress.structure.dataflow.record import Reads, Recorder, run
from mptrain.compress.structure.dataflow.rules import Flow
from mptrain.compress.structure.dataflow.stand_in import Slots, stand_in
from mptrain.compress.structure.dataflow.ways import ways
from mptrain.compress.structure.naming import layer_of, name_of
from mptrain.core.errors import ModelError

MOST_TRIES = 64
"""choices of attributes that are tried for a kind of block"""
STEP = 8
"""numbers of 2 bytes that grouped products of experts take at once"""


def find(model: nn.Module, example: Mapping[str, Any] | None = None) -> tuple[list[Block], list[Refusal]]:
    """Blocks in the order of modules, all proved, and what cannot be cut.

    example: keyword arguments of a forward pass; made up where it is None.
    Raises ModelError for a model that does not run on it.
    """
    with stand_in(model) as slots:
        inputs, flow, reads, results = _flow(model, slots, _inputs(model, example))
        groups = group(flow, _single(model, flow))
        refused = list(groups.lost)
        pairs = []
        for found in groups.found:
            block = _block(model, flow, found)
            reason = found.refused or _fixed(model, block)
            if reason is None:
                pairs.append((found, block))
            else:
                refused.append(Refusal(block.name, reason))
        attention = bool(groups.lost) or any(found.kind == "heads" for found in groups.found) or _had_attention(model)
        blocks, left = _offered(model, flow, pairs, attention)
        refused += left
        blocks = _shared(_ordered(model, blocks))
        bench = proof.Bench(model, slots, ways(model, slots, inputs, results) if blocks else [])
        return _proved(bench, model, blocks, reads, refused)


def faults_without(
    model: nn.Module, blocks: Sequence[Block], example: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """By name, what is wrong when blocks are left out whole; those that are not named can all go together.

    blocks: of `find`, or written down. Raises ModelError for a model that does not run on the example.
    """
    with stand_in(model) as slots:
        inputs, results = _ran(model, _inputs(model, example), nullcontext)
        bench = proof.Bench(model, slots, ways(model, slots, inputs, results))
        if bench.fault_without(blocks) is None:
            return {}
        faults = {block.name: bench.fault_without([block]) for block in blocks}
        right = [block for block in blocks if faults[block.name] is None]
        if right and (fault := bench.fault_without(right)) is not None:
            faults |= {block.name: f"it can go alone, but not with all others: {fault}" for block in right}
        return {name: fault for name, fault in faults.items() if fault is not None}


def _inputs(model: nn.Module, example: Mapping[str, Any] | None) -> list[examples.Inputs]:
    return [examples.made_up(model)] if example is None or _is_empty(example) else examples.given(example)


def _is_empty(example: Mapping[str, Any]) -> bool:
    """Whether it has shapes only, of a model without weights."""
    return any(isinstance(value, Tensor) and value.is_meta for value in example.values())


def _ran(
    model: nn.Module, given: Sequence[examples.Inputs], noting: Callable[[], AbstractContextManager[Any]]
) -> tuple[examples.Inputs, Sequence[Tensor]]:
    """The first of the inputs that the model takes, and its outputs. noting: around each try."""
    for last, inputs in enumerate(given, 1 - len(given)):
        try:
            with noting():
                return inputs, run(model, inputs)
        except Exception as error:
            if last < 0:
                continue
            raise ModelError(
                f"{type(model).__name__} does not run on the example ({', '.join(inputs)}), so its blocks cannot be"
                f" found: {type(error).__name__}: {error}"
            ) from error
    raise AssertionError("there are inputs")


def _flow(
    model: nn.Module, slots: Slots, given: Sequence[examples.Inputs]
) -> tuple[examples.Inputs, Flow, set[tuple[str, str]], Sequence[Tensor]]:
    """The first of the inputs that the model takes; labels, the attributes that were read, and the outputs."""
    noted: list[tuple[Reads, Recorder]] = []

    @contextmanager
    def noting() -> Iterator[None]:
        noted.append((Reads(model), Recorder(model)))
        with noted[-1][0], noted[-1][1]:
            yield

    inputs, results = _ran(model, given, noting)
    reads, recorder = noted[-1]
    named = {name: slots.now(name) for name in slots.tensors}
    # a single number has no index that could leave
    floating = {name: t for name, t in named.items() if t.is_floating_point() and t.dim() and t.numel()}
    flow = Flow(Labels(floating, slots.parameters), recorder.live(results), results)
    return inputs, flow, reads.found, results


# -- blocks


def _single(model: nn.Module, flow: Flow) -> Single:
    """Blocks of which an earlier cut left one unit; by itself it looks like channels that are entangled."""
    left = {name for name, one in saved.blocks(model).items() if one.get("units") == 1}

    def known(kind: Kind, parameters: Collection[int]) -> bool:
        owners = [flow.labels.names[parameter].rpartition(".")[0] for parameter in parameters]
        return bool(left) and name_of(model, owners, kind) in left

    return known


def _block(model: nn.Module, flow: Flow, found: Group) -> Block:
    axes = _axes(flow, found)
    owners = [axis.parameter.rpartition(".")[0] for axis in axes if axis.role != "side"]
    heads = found.query_heads if found.kind == "heads" else 0
    return Block(
        name=name_of(model, owners, found.kind),
        kind=found.kind,
        units=len(found.roots),
        axes=tuple(axes),
        layer=layer_of(model, owners),
        edits=tuple(fields.edits_of(model, axes)),
        heads=heads,
        fixed_params=fixed_params(model, axes),
        cores=tuple(found.cores),
    )


def _axes(flow: Flow, found: Group) -> list[Axis]:
    """Queries, keys, values and others in the order of the pass, each with its module's bias; sinks; other sides."""
    marks, labels = flow.marks, flow.labels

    def first(place: Place) -> tuple[int, int, int]:
        nodes = labels.first_node[place[0]][place[1]] + found.indices[place].ravel()
        return int(marks.roles[nodes].min()), int(marks.order[nodes].min()), place[0]

    def is_table(place: Place) -> bool:
        nodes = labels.first_node[place[0]][place[1]] + found.indices[place].ravel()
        return bool(marks.tables[nodes].all())

    def is_sink(place: Place) -> bool:
        return bool(marks.sinks[labels.first_node[place[0]][place[1]] + found.indices[place].ravel()].all())

    def axis(place: Place, indices: np.ndarray, role: Role) -> Axis:
        shape = labels.shapes[place[0]]
        weights = int(np.prod(shape)) // shape[place[1]]
        return Axis(labels.names[place[0]], place[1], np.sort(indices, axis=1), role, shape[place[1]], weights)

    sides = {labels.names[place[0]]: axis(place, indices, "side") for place, indices in found.sides.items()}
    axes = []
    tables = [place for place in found.indices if is_table(place) and not is_sink(place)]
    for place in sorted((p for p in found.indices if not is_sink(p) and p not in tables), key=first):
        axes.append(axis(place, found.indices[place], "source"))
        bias = f"{axes[-1].parameter.rpartition('.')[0]}.bias"
        if bias in sides:
            axes.append(sides.pop(bias))
    axes += [axis(place, found.indices[place], "sink") for place in sorted(filter(is_sink, found.indices))]
    return [*axes, *(axis(place, found.indices[place], "side") for place in tables), *sides.values()]


def _ordered(model: nn.Module, blocks: Iterable[Block]) -> list[Block]:
    """In the order of modules; blocks of one name numbered."""
    place = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    blocks = sorted(blocks, key=lambda block: min(place.get(axis.parameter, len(place)) for axis in block.sources))
    names = [block.name for block in blocks]
    return [
        replace(block, name=f"{block.name}.{names[:i].count(block.name)}") if names.count(block.name) > 1 else block
        for i, block in enumerate(blocks)
    ]


def _shared(blocks: list[Block]) -> list[Block]:
    """With the share that each has in a parameter that several cut."""
    users: dict[str, set[tuple[str, int]]] = {}
    for block in blocks:
        for axis in block.axes:
            users.setdefault(axis.parameter, set()).add((block.name, axis.dim))
    return [
        replace(
            block, axes=tuple(replace(axis, parts=len({d for _, d in users[axis.parameter]})) for axis in block.axes)
        )
        for block in blocks
    ]


# -- what is left whole


def _fixed(model: nn.Module, block: Block) -> str | None:
    if not block.sources:
        return "what makes it reads it too, as the state of a recurrence: its size is a choice"
    for axis in block.axes:
        owner = model.get_submodule(axis.parameter.rpartition(".")[0])
        if isinstance(owner, nn.MultiheadAttention):
            return "nn.MultiheadAttention checks its width itself: replace it by a module with projections of its own"
    return None


def _offered(
    model: nn.Module, flow: Flow, pairs: Iterable[tuple[Group, Block]], attention: bool
) -> tuple[list[Block], list[Refusal]]:
    """attention: whether the model has any, or had before it was pruned."""
    bent = flow.marks.of_classes(flow.marks.bent, flow.labels.roots())
    kept, left = [], []
    for found, block in pairs:
        reason = None
        if block.kind == "ffn" and not bent[found.roots].any():
            reason = "two matrices with nothing between them are a low rank, whose size is a choice"
        elif attention and block.kind == "channels":
            reason = "convolutions beside attention are left whole"
        elif attention and block.kind == "ffn" and not _in_a_layer(model, block):
            reason = "in no layer: poolers and the heads of tasks are left whole"
        if reason is None:
            kept.append(block)
        else:
            left.append(Refusal(_modules(block), reason))
    return kept, left


def _had_attention(model: nn.Module) -> bool:
    """Whether an earlier cut left out attentions whole, all of them perhaps."""
    return any(block["kind"] == "heads" for block in saved.blocks(model).values())


def _in_a_layer(model: nn.Module, block: Block) -> bool:
    """Whether all its modules are in members of lists of alike modules."""
    return all(_is_listed(model, owner.split(".")) for owner in _owners(block))


def _is_listed(model: nn.Module, path: list[str]) -> bool:
    for place, part in enumerate(path[:-1]):
        holder = model.get_submodule(".".join(path[:place]))
        if part.isdigit() and isinstance(holder, nn.ModuleList | nn.Sequential):
            return True
    return False


def _modules(block: Block) -> str:
    """The block in words, for one that has no name of its own."""
    owners = _owners(block)
    return " → ".join([*owners[:3], "…", *owners[-1:]] if len(owners) > 5 else owners)


def _owners(block: Block) -> list[str]:
    return list(dict.fromkeys(axis.parameter.rpartition(".")[0] for axis in block.axes if axis.role != "side"))


# -- proof


def _proved(
    bench: proof.Bench, model: nn.Module, blocks: list[Block], reads: set[tuple[str, str]], refused: list[Refusal]
) -> tuple[list[Block], list[Refusal]]:
    """All at once; where that fails, one by one."""
    found = candidates(model, blocks, reads)
    edited = [_with(block, found, found.likely(block.name)) for block in blocks]
    if not blocks or bench.fault(edited) is None:
        return edited, refused
    settled: dict[tuple[Key, ...], frozenset[Key]] = {}
    for block in blocks:
        keys = tuple(sorted(found.open[block.name]))
        if keys not in settled and (choice := _choice(bench, block, found, keys)) is not None:
            settled[keys] = choice
    edited = [
        _with(block, found, settled.get(tuple(sorted(found.open[block.name])), found.likely(block.name)))
        for block in blocks
    ]
    if bench.fault(edited) is None:
        return edited, refused
    faults = {block.name: bench.fault([block]) for block in edited}
    for place, block in enumerate(edited):
        wide = replace(block, step=STEP)
        if (
            faults[block.name] is not None
            and block.kind != "heads"
            and block.units > STEP
            and bench.fault([wide]) is None
        ):
            edited[place], faults[block.name] = wide, None
    refused += [Refusal(name, f"the proof failed: {fault}") for name, fault in faults.items() if fault is not None]
    blocks = [block for block in edited if faults[block.name] is None]
    if blocks and (fault := bench.fault(blocks)) is not None:
        raise ModelError(f"{type(model).__name__}: its blocks can be cut one by one, but not together: {fault}")
    return blocks, refused


def _choice(bench: proof.Bench, block: Block, found: Candidates, keys: Sequence[Key]) -> frozenset[Key] | None:
    """The open keys with which the block is right, the likely ones first; None: there are none."""
    likely = found.likely(block.name)
    tries = [likely.symmetric_difference(some) for n in range(len(keys) + 1) for some in combinations(keys, n)]
    return next((some for some in tries[:MOST_TRIES] if bench.fault([_with(block, found, some)]) is None), None)


def _with(block: Block, found: Candidates, keys: frozenset[Key]) -> Block:
    edits: list[Edit] = [edit for key, own in found.open[block.name].items() if key in keys for edit in own]
    return replace(block, edits=(*block.edits, *edits, *found.always[block.name]))
