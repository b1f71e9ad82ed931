"""Classes of nodes to blocks of units.

A class is a unit when it has a source (something computes it) and a sink (something reads it), and nothing froze it:
it reaches no output, and no operation mixes or chooses between its members. Classes that take as many indices of the
same dimensions of the same parameters are the units of one block. What softmax or an attention kernel ran over are
heads, what a convolution reads are channels, all else an FFN's.

Parameters that units only met (a bias, a table with a column for each head) are *sides*: where every index of a
dimension met at most one unit it is cut with it, where it met all of them it stays. An index that two blocks share, or
a constant with an entry for each unit that both read, *ties* their units: they are joined, and all is grouped anew.

Refused: a constant that differs from unit to unit (ALiBi), a side that is also met outside the block.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from mptrain.compress.structure.blocks import Kind, Refusal
from mptrain.compress.structure.dataflow.labels import CODES, nodes_in, thin
from mptrain.compress.structure.dataflow.marks import OTHER, Constant
from mptrain.compress.structure.dataflow.rules import Flow

Place = tuple[int, int]
"""(number of a parameter, dimension)"""


@dataclass
class Group:
    """A block to be. roots: of its units, in their order. indices: [units, n] by place, of sources and sinks."""

    kind: Kind
    roots: list[int]
    indices: dict[Place, np.ndarray]
    query_heads: int = 0
    cores: list[str] = field(default_factory=list)
    sides: dict[Place, np.ndarray] = field(default_factory=dict)
    refused: str | None = None


@dataclass(frozen=True)
class Groups:
    """lost: attention that is in no block, with the reason."""

    found: list[Group]
    lost: list[Refusal]


Single = Callable[[Kind, Collection[int]], bool]
"""Whether a class that is alike to no other is a block of one unit: its kind, and the numbers of its parameters."""


def group(flow: Flow, single: Single) -> Groups:
    """All blocks, and ties between them resolved."""
    while True:
        grouping = _Grouping(flow, single)
        if not grouping.ties:
            return Groups(grouping.groups, grouping.lost())
        flow.labels.join(grouping.ties)


class _Grouping:
    def __init__(self, flow: Flow, single: Single) -> None:
        self.flow, self.marks, self._single = flow, flow.marks, single
        self.roots = flow.labels.roots()
        self.frozen = self.marks.of_classes(self.marks.frozen, self.roots)
        self._in_products = self.marks.of_classes(self.marks.roles != OTHER, self.roots)
        self._attended = self._attentions()
        self.groups = self._units()
        self.ties: list[tuple[int, int]] = []
        self._block = np.full(len(self.roots), -1)
        self._unit = np.full(len(self.roots), -1)
        for number, one in enumerate(self.groups):
            self._block[one.roots], self._unit[one.roots] = number, np.arange(len(one.roots))
        self._find_sides()
        self._check_constants()

    # -- units

    def _units(self) -> list[Group]:
        source = self.marks.of_classes(self.marks.sources, self.roots)
        sink = self.marks.of_classes(self.marks.sinks, self.roots)
        convolved = self.marks.of_classes(self.marks.convolved, self.roots)
        used = np.flatnonzero(self.marks.sources | self.marks.sinks)
        used = used[(source & sink & ~self.frozen)[self.roots[used]]]
        alike: dict[tuple[tuple[Place, int], ...], list[list[np.ndarray]]] = {}
        for parts in self._by_class(used).values():
            signature = tuple((place, end - start) for place, start, end in parts)
            alike.setdefault(signature, []).append([self._sorted[start:end] for _, start, end in parts])
        found = []
        for signature, units in alike.items():
            units.sort(key=lambda parts: int(parts[0][0]))
            nodes = {place: np.stack([parts[i] for parts in units]) for i, (place, _) in enumerate(signature)}
            roots = self.roots[nodes[signature[0][0]][:, 0]].tolist()
            indices = {(p, d): at - self.flow.labels.first_node[p][d] for (p, d), at in nodes.items()}
            heads, cores = self._attended.get(roots[0], (0, []))
            kind: Kind = "heads" if cores else "channels" if convolved[roots[0]] else "ffn"
            if len(roots) > 1 or heads == 1 or self._single(kind, {p for p, _ in indices}):
                found.append(Group(kind, roots, indices, max(1, heads // len(roots)) if heads else 0, cores))
        return found

    def _by_class(self, nodes: np.ndarray) -> dict[int, list[tuple[Place, int, int]]]:
        """By root, (place, start, end) of its runs in `_sorted`: nodes in the order of classes, then of places."""
        self._sorted = nodes[np.argsort(self.roots[nodes], kind="stable")]
        roots, places = self.roots[self._sorted], self._places(self._sorted)
        edges = np.flatnonzero(np.diff(roots, prepend=-1).astype(bool) | np.diff(places, prepend=-1).astype(bool))
        found: dict[int, list[tuple[Place, int, int]]] = {}
        ends = [*edges[1:].tolist(), len(nodes)]
        for root, place, start, end in zip(roots[edges].tolist(), places[edges].tolist(), edges.tolist(), ends):
            found.setdefault(root, []).append((self._all_places[place], start, end))
        return found

    def _places(self, nodes: np.ndarray) -> np.ndarray:
        """The number in `_all_places` of where each node is."""
        firsts = self.flow.labels.first_node
        self._all_places = [
            (p, d) for p, shape in enumerate(self.flow.labels.shapes) for d, size in enumerate(shape) if size
        ]
        return np.searchsorted([firsts[p][d] for p, d in self._all_places], nodes, "right") - 1

    # -- attention

    def _attentions(self) -> dict[int, tuple[int, list[str]]]:
        """By class, the heads of the attention that it is in, and the modules that these run in."""
        found: dict[int, tuple[int, list[str]]] = {}
        for attention in self.marks.attentions:
            labels = self.flow.labels.canonical(attention.labels)
            for root in filter(self._in_products.__getitem__, nodes_in(labels).tolist()):
                heads, modules = found.get(root, (_heads(labels), []))
                found[root] = heads, list(dict.fromkeys([*modules, attention.module]))
        return found

    def lost(self) -> list[Refusal]:
        reasons: dict[str, str] = {}
        for attention in self.marks.attentions:
            roots = nodes_in(self.flow.labels.canonical(attention.labels)).tolist()
            if roots and all(self._block[root] < 0 for root in roots) and self._is_attention(roots):
                reasons[attention.module] = self._why_lost(roots)
        return [Refusal(what, reason) for what, reason in reasons.items()]

    def _is_attention(self, roots: list[int]) -> bool:
        """Whether products of numbers made what softmax ran over; a router or a loss multiplies with a matrix only."""
        return bool(self._in_products[roots].any())

    def _why_lost(self, roots: list[int]) -> str:
        frozen = [root for root in roots if self.frozen[root]]
        if frozen:
            members = np.flatnonzero(self.roots == frozen[0]).tolist()
            return f"its heads cannot be cut: {self.marks.reason(members)}"
        if len(roots) > 1:
            return "its heads have no projections of their own"
        used = np.flatnonzero((self.roots == roots[0]) & (self.marks.sources | self.marks.sinks))
        owners = {self._all_places[place][0] for place in np.unique(self._places(used)).tolist()}
        parts = ", ".join(sorted(self.flow.labels.names[owner] for owner in owners)[:4])
        return f"its heads are entangled: something mixes their channels ({parts})"

    # -- sides

    def _find_sides(self) -> None:
        labels = self.flow.labels
        codes, ends = labels.attached()
        owners, roots = labels.owners(codes), self.roots[ends]
        for parameter in np.unique(owners[self._block[roots] >= 0]).tolist():
            mine = owners == parameter
            at = labels.coordinates(parameter, codes[mine])
            for d, size in enumerate(labels.shapes[parameter]):
                if size > 1:
                    self._side((parameter, d), *np.unique(np.stack([at[d], roots[mine]]), axis=1))

    def _side(self, place: Place, index: np.ndarray, root: np.ndarray) -> None:
        """index, root: all pairs of an index along the place and the class that it met."""
        block, own = self._block[root], []
        for number in sorted(set(block.tolist()) - {-1}):
            mine = block == number
            units = self._unit[root[mine]]
            one = self.groups[number]
            if len(np.unique(index[mine])) < mine.sum() or len(np.unique(units)) < min(2, len(one.roots)):
                continue  # an index that several units met stays
            own.append(number)
            name = self.flow.labels.names[place[0]]
            counts = np.bincount(units, minlength=len(one.roots))
            if np.isin(index[block < 0], index[mine]).any():
                one.refused = f"{name} is also used outside of it"
            elif (counts != counts[0]).any():
                one.refused = f"its units take unequal parts of {name}"
            elif place not in one.indices:
                one.sides[place] = index[mine][np.argsort(units, kind="stable")].reshape(len(one.roots), -1)
        if len(own) > 1:
            self.ties += _chained(index, root, np.isin(block, own))

    # -- constants

    def _check_constants(self) -> None:
        seen: dict[int, list[int]] = {}
        for constant in self.marks.constants:
            for d, roots in self._varying(constant):
                values = constant.values.expand(constant.labels.shape)
                if values.stride(d) == 0:
                    continue
                blocks = {int(self._block[root]) for root in roots} - {-1}
                if not torch.equal(values, values.narrow(d, 0, 1).expand_as(values)):
                    for number in blocks:
                        self.groups[number].refused = (
                            "a constant differs from unit to unit, as the slopes of ALiBi do: make it a buffer of the"
                            " model, which is then cut along"
                        )
                elif all(self._block[root] >= 0 for root in roots):
                    before = seen.setdefault(constant.storage, roots)
                    if len(before) == len(roots):
                        self.ties += [(a, b) for a, b in zip(before, roots) if a != b]

    def _varying(self, constant: Constant) -> Iterator[tuple[int, list[int]]]:
        """(dimension, class at each index) where a constant met several classes of units."""
        labels = self.flow.labels.canonical(*thin(constant.labels)).expand(constant.labels.shape)
        for d in range(labels.dim()):
            line = labels.movedim(d, 0).reshape(labels.shape[d], -1)
            if labels.stride(d) and line.shape[1] and not bool((line == line[:1]).all()):
                roots = line[:, 0].tolist()
                if all(0 <= root < CODES for root in roots) and any(self._block[root] >= 0 for root in roots):
                    yield d, roots


def _chained(index: np.ndarray, root: np.ndarray, mine: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of the classes that met the same index."""
    found = []
    for i in np.unique(index[mine]).tolist():
        first, *others = root[mine & (index == i)].tolist()
        found += [(first, other) for other in others]
    return found


def _heads(labels: Tensor) -> int:
    """The size of the dimension along which most classes lie; of [batch, heads, …] where there is one class."""
    if labels.dim() > 1 and len(labels.unique()) == 1:
        return labels.shape[1]
    widest = (1, 1)
    for d in range(labels.dim()):
        line = labels.movedim(d, 0).reshape(labels.shape[d], -1)
        if line.shape[1]:
            widest = max(widest, (line[:, 0].unique().numel(), labels.shape[d]))
    return widest[1]
