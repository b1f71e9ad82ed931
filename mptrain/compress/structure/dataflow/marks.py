"""What the operations tell of nodes, beside which belong together."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mptrain.compress.structure.dataflow.labels import Labels, nodes_in, storage

QUERY, KEY, VALUE, OTHER = range(4)


@dataclass(frozen=True)
class Attention:
    """A softmax, or a kernel that holds one. labels: [batch, heads], of the class of each. module: that it ran in."""

    labels: Tensor
    module: str


@dataclass(frozen=True)
class Constant:
    """A tensor that no parameter made and that met labels of the same shape."""

    values: Tensor
    labels: Tensor
    storage: int


class Marks:
    """sources, sinks, convolved: nodes whose index makes or reads a channel, the last in a convolution over
    all channels. tables: sources of which rows are looked up only. bent: through
    something else than products and sums. order: of sources, the number of the product that first used them. roles: in
    an attention.
    """

    def __init__(self, labels: Labels) -> None:
        nodes = len(labels.parent)
        self.labels = labels
        self.sources, self.sinks, self.tables = (np.zeros(nodes, bool) for _ in range(3))
        self.convolved, self.bent, self.frozen = (np.zeros(nodes, bool) for _ in range(3))
        self.reasons: dict[int, str] = {}
        self.attentions: list[Attention] = []
        self.constants: list[Constant] = []
        self.order = np.full(nodes, np.iinfo(np.int64).max)
        self.roles = np.full(nodes, OTHER)
        self._products = 0

    def table(self, nodes: Tensor) -> None:
        """Sources whose rows are looked up."""
        self.tables[nodes.numpy()] = ~self.sources[nodes.numpy()] | self.tables[nodes.numpy()]
        self.sources[nodes.numpy()] = True

    def source(self, nodes: Tensor, convolution: bool = False) -> None:
        self.sources[nodes.numpy()], self.tables[nodes.numpy()] = True, False
        self.convolved[nodes.numpy()] |= convolution
        self._products += 1
        self.order[nodes.numpy()] = np.minimum(self.order[nodes.numpy()], self._products)

    def role(self, labels: Tensor, role: int) -> None:
        """QUERY, KEY or VALUE of an attention; the first that is said counts."""
        nodes = nodes_in(labels).numpy()
        self.roles[nodes] = np.where(self.roles[nodes] == OTHER, role, self.roles[nodes])

    def sink(self, nodes: Tensor, convolution: bool = False) -> None:
        self.sinks[nodes.numpy()] = True
        self.convolved[nodes.numpy()] |= convolution

    def freeze(self, labels: Tensor, why: str) -> None:
        """Nothing of these classes can be cut."""
        for node in nodes_in(labels).tolist():
            self.frozen[node] = True
            self.reasons.setdefault(node, why)

    def bend(self, labels: Tensor) -> None:
        self.bent[nodes_in(labels).numpy()] = True

    def attended(self, labels: Tensor, module: str) -> None:
        self.attentions.append(Attention(labels, module))

    def constant(self, values: Tensor, labels: Tensor) -> None:
        if values.numel() > 1 and len(nodes_in(labels)):
            self.constants.append(Constant(values, labels, storage(values)))

    def of_classes(self, marked: np.ndarray, roots: np.ndarray) -> np.ndarray:
        """bool by root: whether any node of the class is marked."""
        found = np.zeros(len(roots), bool)
        found[roots[marked]] = True
        return found

    def reason(self, members: Iterable[int]) -> str:
        """Why a class is frozen. members: its nodes."""
        return next((self.reasons[node] for node in members if node in self.reasons), "it reaches an output")
