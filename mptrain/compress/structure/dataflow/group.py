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

from collections.abc import Iterator
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


def group(flow: Flow) -> Groups:
    """All blocks, and ties between them resolved."""
    while True:
        grouping = _Grouping(flow)
        if not grouping.ties:
            return Groups(grouping.groups, grouping.lost())
        flow.labels.join(grouping.ties)


class _Grouping:
    def __init__(self, flow: Flow) -> None:
        self.flow, self.marks = flow, flow.marks
        self.roots = flow.labels.roots()
        self.frozen = self.marks.of_classes(self.marks.frozen, self.roots)
        self.members = self._classes()
        self.groups = self._units()
        self.ties: list[tuple[int, int]] = []
        self._block = np.full(len(self.roots), -1)
        self._unit = np.full(len(self.roots), -1)
        for number, one in enumerate(self.groups):
            self._block[one.roots], self._unit[one.roots] = number, np.arange(len(one.roots))
        self._attentions()
        self._find_sides()
        self._check_constants()

    # -- units

    def _classes(self) -> dict[int, dict[Place, np.ndarray]]:
        """The sources and sinks of every class, by root: ascending indices by place."""
        used = np.flatnonzero(self.marks.sources | self.marks.sinks)
        used = used[np.argsort(self.roots[used], kind="stable")]
        places = [(p, d) for p, firsts in enumerate(self.flow.labels.first_node) for d in range(len(firsts))]
        starts = np.array([first for firsts in self.flow.labels.first_node for first in firsts])
        sizes = np.array([n for shape in self.flow.labels.shapes for n in shape])
        order = np.flatnonzero(sizes > 0)
        which = order[np.searchsorted(starts[order], used, "right") - 1]
        found: dict[int, dict[Place, np.ndarray]] = {}
        edges = np.flatnonzero(np.diff(self.roots[used])) + 1
        for nodes, at in zip(np.split(used, edges), np.split(which, edges)):
            inner = np.flatnonzero(np.diff(at)) + 1
            parts = zip(np.split(nodes, inner), np.split(at, inner))
            if len(nodes):
                found[int(self.roots[nodes[0]])] = {places[k[0]]: part - starts[k[0]] for part, k in parts}
        return found

    def _units(self) -> list[Group]:
        source = self.marks.of_classes(self.marks.sources, self.roots)
        sink = self.marks.of_classes(self.marks.sinks, self.roots)
        convolved = self.marks.of_classes(self.marks.convolved, self.roots)
        alike: dict[tuple[tuple[Place, int], ...], list[int]] = {}
        for root, parts in self.members.items():
            if source[root] and sink[root] and not self.frozen[root]:
                alike.setdefault(tuple((place, len(at)) for place, at in parts.items()), []).append(root)
        found = []
        for signature, roots in alike.items():
            if len(roots) < 2:
                continue
            first = signature[0][0]
            roots.sort(key=lambda root: int(self.members[root][first][0]))
            indices = {place: np.stack([self.members[root][place] for root in roots]) for place, _ in signature}
            found.append(Group("channels" if convolved[roots[0]] else "ffn", roots, indices))
        return found

    # -- attention

    def _attentions(self) -> None:
        for attention in self.marks.attentions:
            labels = self.flow.labels.canonical(attention.labels)
            for number in {int(self._block[root]) for root in nodes_in(labels).tolist()} - {-1}:
                one = self.groups[number]
                one.kind = "heads"
                one.query_heads = max(1, _heads(labels) // len(one.roots))
                one.cores = list(dict.fromkeys([*one.cores, attention.module]))

    def lost(self) -> list[Refusal]:
        reasons: dict[str, str] = {}
        for attention in self.marks.attentions:
            roots = nodes_in(self.flow.labels.canonical(attention.labels)).tolist()
            if roots and all(self._block[root] < 0 for root in roots) and self._is_attention(roots):
                reasons[attention.module] = self._why_lost(roots)
        return [Refusal(what, reason) for what, reason in reasons.items()]

    def _is_attention(self, roots: list[int]) -> bool:
        """Whether products of numbers made what softmax ran over; a router or a loss multiplies with a matrix only."""
        return bool((self.marks.roles[np.isin(self.roots, roots)] != OTHER).any())

    def _why_lost(self, roots: list[int]) -> str:
        frozen = [root for root in roots if self.frozen[root]]
        if frozen:
            members = np.flatnonzero(self.roots == frozen[0]).tolist()
            return f"its heads cannot be cut: {self.marks.reason(members)}"
        if len(roots) > 1:
            return "its heads have no projections of their own"
        names = self.flow.labels.names
        parts = ", ".join(sorted({names[p] for p, _ in self.members.get(roots[0], {})})[:4])
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
            if len(np.unique(index[mine])) < mine.sum() or len(np.unique(units)) < 2:
                continue  # an index that several units met stays
            own.append(number)
            one, name = self.groups[number], self.flow.labels.names[place[0]]
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
    """The size of the dimension along which most classes lie."""
    widest = (1, 1)
    for d in range(labels.dim()):
        line = labels.movedim(d, 0).reshape(labels.shape[d], -1)
        if line.shape[1]:
            widest = max(widest, (line[:, 0].unique().numel(), labels.shape[d]))
    return widest[1]
