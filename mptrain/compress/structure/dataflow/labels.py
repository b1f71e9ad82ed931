"""Which unit each number of a forward pass belongs to: labels on the elements of storages, joined by union-find.

A *node* is one index of one dimension of one parameter or buffer: row 3 of a matrix. A *label* is

    -1                 nothing: a constant, an input, a mask
    0 ≤ label < CODES  a node, and with it the class of all nodes that can only be cut together
    CODES + i          the plain element i of a parameter: an entry of a bias, before it meets anything

Labels lie on the elements of storages, not on tensors, so views, chunks, permutations, expansions and writes into a
part of a tensor need no rule: they read and write the labels of the same elements. Those of a parameter follow from
its geometry and are never stored.

    meet(a, b)     where two labels come together in one number: nodes join, an entry of a parameter is attached
    along(x, dims) the same for all numbers along dimensions that an operation adds up, normalizes or compares

Most labels do not vary along the batch and tokens; every operation first narrows them there to one (`thin`).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

CODES = 1 << 40


def is_node(labels: Tensor) -> Tensor:
    return (labels >= 0) & (labels < CODES)


def storage(tensor: Tensor) -> int:
    """Names the storage of a tensor as long as it is alive."""
    return tensor.untyped_storage()._cdata


def thin(*labels: Tensor) -> list[Tensor]:
    """Labels broadcast against each other, of size 1 in every dimension along which none of them varies."""
    found = list(torch.broadcast_tensors(*labels))
    for d in range(found[0].dim()):
        if found[0].shape[d] > 1 and all(_constant(x, d) for x in found):
            found = [x.narrow(d, 0, 1) for x in found]
    return found


def nodes_in(labels: Tensor) -> Tensor:
    """The different nodes among labels, ascending."""
    (labels,) = thin(labels)
    return labels[is_node(labels)].unique()


def _constant(labels: Tensor, d: int) -> bool:
    if labels.stride(d) == 0 or labels.numel() == 0:
        return True
    first, last = labels.narrow(d, 0, 1), labels.narrow(d, labels.shape[d] - 1, 1)
    return torch.equal(first, last) and bool((labels == first).all())


class Labels:
    """Labels of all tensors of one forward pass.

    tensors: parameters and buffers by name, each contiguous and with a storage of its own. learned: those that are
    parameters.
    """

    def __init__(self, tensors: Mapping[str, Tensor], learned: Iterable[str]) -> None:
        self.names = list(tensors)
        self.shapes = [tuple(t.shape) for t in tensors.values()]
        self.learned = [name in set(learned) for name in tensors]
        self._first_code: list[int] = []
        self.first_node: list[list[int]] = []
        self.of_storage: dict[int, Tensor | int] = {}  # an int: the code of the element 0 of a parameter's storage
        self._bytes: dict[int, int] = {}
        code, node = CODES, 0
        for tensor in tensors.values():
            self._first_code.append(code)
            self.of_storage[storage(tensor)] = code - int(tensor.storage_offset())
            self._bytes[storage(tensor)] = tensor.element_size()
            self.first_node.append(np.cumsum([node, *tensor.shape[:-1]]).tolist() if tensor.dim() else [])
            node += sum(tensor.shape)
            code += tensor.numel()
        self._ends = np.array([*self._first_code, code])
        self._parameters = frozenset(self.of_storage)
        self.parent = np.arange(max(1, node))
        self._attached: list[np.ndarray] = []

    # -- of tensors

    def of(self, tensor: Tensor) -> Tensor | None:
        """int64, of the tensor's shape; None for one that no parameter has reached."""
        found = self.of_storage.get(storage(tensor))
        if found is None:
            return None
        if isinstance(found, int):
            codes = torch.full((1,) * tensor.dim(), found + int(tensor.storage_offset()))
            for d, (size, stride) in enumerate(zip(tensor.shape, tensor.stride())):
                codes = codes + (torch.arange(size) * stride).view([-1 if i == d else 1 for i in range(tensor.dim())])
            return codes.expand(tensor.shape)
        before, now = self._bytes[storage(tensor)], tensor.element_size()
        if before > now:  # complex numbers seen as pairs
            found = found.repeat_interleave(before // now)
        elif before < now:
            pairs = found[: len(found) // (now // before) * (now // before)].view(-1, now // before)
            found = self.along(pairs, [1])[:, 0]
        (labels,) = thin(torch.as_strided(found, tensor.size(), tensor.stride(), tensor.storage_offset()))
        return self.canonical(labels).expand(tensor.shape)

    def full(self, tensor: Tensor) -> Tensor:
        found = self.of(tensor)
        return torch.full((1,) * tensor.dim(), -1).expand(tensor.shape) if found is None else found

    def put(self, tensor: Tensor, labels: Tensor) -> None:
        """labels: that broadcast to the tensor."""
        key, labels = storage(tensor), labels.expand(tensor.shape)
        if not isinstance(self.of_storage.get(key), Tensor):
            elements = max(1, tensor.untyped_storage().nbytes() // tensor.element_size())
            self.of_storage[key] = torch.full((elements,), -1)
            self._bytes[key] = tensor.element_size()
        stored = self.of_storage[key]
        assert isinstance(stored, Tensor)
        once = tuple(slice(0, 1) if stride == 0 else slice(None) for stride in tensor.stride())
        tensor, labels = tensor[once], labels[once]
        torch.as_strided(stored, tensor.size(), tensor.stride(), tensor.storage_offset()).copy_(labels)

    def is_parameter(self, tensor: Tensor) -> bool:
        """Whether it is a view of a parameter or buffer, not something computed from it."""
        return storage(tensor) in self._parameters

    # -- joining

    def canonical(self, labels: Tensor) -> Tensor:
        node = is_node(labels)
        if not node.any():
            return labels
        parent = torch.from_numpy(self.parent)
        at = torch.where(node, labels, 0)
        while True:
            above = parent[at]
            if torch.equal(above, at):
                return torch.where(node, at, labels)
            at = above

    def root(self, node: int) -> int:
        parent = self.parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = int(parent[node])
        return node

    def join(self, pairs: Iterable[tuple[int, int]]) -> None:
        for a, b in pairs:
            a, b = self.root(a), self.root(b)
            self.parent[max(a, b)] = min(a, b)

    def join_all(self, nodes: Sequence[int]) -> None:
        self.join((nodes[0], other) for other in nodes[1:])

    def roots(self) -> np.ndarray:
        """The root of every node."""
        while True:
            above = self.parent[self.parent]
            if (above == self.parent).all():
                return above
            self.parent[:] = above

    def meet(self, a: Tensor, b: Tensor) -> Tensor:
        """What comes of labels that meet element by element, broadcast against each other."""
        shape = torch.broadcast_shapes(a.shape, b.shape)
        a, b = thin(a, b)
        node_a, node_b = is_node(a), is_node(b)
        both = node_a & node_b & (a != b)
        if both.any():
            n = len(self.parent)
            self.join(divmod(key, n) for key in (a[both] * n + b[both]).unique().tolist())
        for codes, nodes, met in ((a, b, (a >= CODES) & node_b), (b, a, (b >= CODES) & node_a)):
            if met.any():
                self._attached.append(np.unique(((codes[met] - CODES) * len(self.parent) + nodes[met]).numpy()))
        first = torch.where(node_a, a, torch.where(node_b, b, torch.where(a >= 0, a, b)))
        return self.canonical(first).expand(shape)

    def along(self, labels: Tensor, dims: Iterable[int]) -> Tensor:
        """Labels that meet along `dims`; the result has size 1 there."""
        dims = sorted(d % labels.dim() for d in dims)
        rest = [d for d in range(labels.dim()) if d not in dims]
        sizes = [1 if d in dims else n for d, n in enumerate(labels.shape)]
        (labels,) = thin(labels)
        flat = labels.permute(rest + dims).flatten(len(rest)) if dims else labels.unsqueeze(-1)
        if flat.numel() == 0:
            return torch.full((1,) * len(sizes), -1).expand(sizes)
        rank = torch.where(is_node(flat), 2, torch.where(flat >= CODES, 1, 0))
        chosen = flat.gather(-1, rank.argmax(-1, keepdim=True))
        joined = self.meet(chosen, flat)[..., :1]
        thinned = [1 if d in dims else n for d, n in enumerate(labels.shape)]
        return joined.reshape(thinned).expand(sizes)

    def attached(self) -> tuple[np.ndarray, np.ndarray]:
        """(codes, nodes) that met."""
        keys = np.unique(np.concatenate(self._attached)) if self._attached else np.zeros(0, dtype=np.int64)
        return keys // len(self.parent) + CODES, keys % len(self.parent)

    # -- parameters

    def place(self, codes: Tensor) -> tuple[int, tuple[np.ndarray, ...]] | None:
        """(number of the parameter, coordinates) of codes; None for others, of several parameters, or of a buffer."""
        flat = codes.reshape(-1).numpy()
        if not len(flat) or flat.min() < CODES:
            return None
        owner = self.owners(flat)
        if (owner != owner[0]).any() or not self.learned[owner[0]]:
            return None
        first = int(owner[0])
        return first, np.unravel_index(flat - self._first_code[first], self.shapes[first])

    def owners(self, codes: np.ndarray) -> np.ndarray:
        """Numbers of the parameters that elements belong to."""
        return np.searchsorted(self._ends, codes, "right") - 1

    def coordinates(self, parameter: int, codes: np.ndarray) -> tuple[np.ndarray, ...]:
        return np.unravel_index(codes - self._first_code[parameter], self.shapes[parameter])

    def nodes_along(self, codes: Tensor, taken: int | None = None) -> tuple[Tensor, int] | None:
        """(nodes, dimension) of elements in a line along one dimension of a parameter; `taken` is the other one's."""
        found = self.place(codes)
        if found is None:
            return None
        owner, at = found
        varying = [d for d, index in enumerate(at) if (index != index[0]).any()]
        single = [d for d, size in enumerate(self.shapes[owner]) if size == 1 and d != taken]
        d = (varying or single or [len(at) - 1])[0]
        return torch.from_numpy(self.first_node[owner][d] + at[d]), d
