"""What belongs together because it has one label: groups of texts or pictures, for search.

learning   −log exp(20 u·v₊) / Σ_v exp(20 u·v), over a batch of members, each with a partner v₊ that the seed draws
           from its group; v that belong to u as well are left out
scoring    a search for each member among all others of the split (retrieval.py)
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, log_softmax

from mptrain.core.errors import DataError
from mptrain.data.sources.quoting import shown
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.agreement import order
from mptrain.data.tasks.metrics import Score
from mptrain.data.tasks.retrieval import retrieval

SCALE = 20.0
"""of cosines in the softmax, as sentence-transformers has it"""
MANY_GROUPS = 50
"""from so many on, groups never cross splits: a search is then for groups that training has not seen"""


def kept_apart(table: Table) -> str | None:
    """The field whose values never cross splits."""
    values = table.columns.get("label")
    return "label" if values is not None and len(set(map(str, values))) >= MANY_GROUPS else None


def check_names(tables: Mapping[str, Table], what: str) -> dict[str, int]:
    """Replace labels by names of groups; how many there are in each split. what: a member, for messages.

    Raises DataError for a cell without a name, and for a group with one member in training.
    """
    for table in tables.values():
        table.columns["label"] = [_name(cell, table, row) for row, cell in enumerate(table["label"])]
    counts = Counter(tables["train"]["label"])
    for row, name in enumerate(tables["train"]["label"]):
        if counts[name] == 1:
            raise DataError(
                f"{tables['train'].place('label', row)}: the group {shown(name)} has no other {what} in the"
                " training split, so nothing belongs to this one. Drop the row, or keep groups in one"
                " split with data.split.group."
            )
    return {split: len(set(table["label"])) for split, table in tables.items()}


def partners(names: Sequence[str], seed: int) -> list[int]:
    """Another row of the same group to each row."""
    members: dict[str, list[int]] = {}
    for row, name in enumerate(names):
        members.setdefault(name, []).append(row)
    draw = random.Random(seed)
    found = []
    for row, name in enumerate(names):
        others = members[name]
        place = draw.randrange(len(others) - 1) if len(others) > 1 else 0
        found.append(others[place] if others[place] != row else others[-1])
    return found


def contrastive(queries: Tensor, others: Tensor, same: Tensor) -> Tensor:
    """Mean over queries; query i belongs to others[i].

    queries: [b, h] of length 1. others: [≥ b, h]. same: bool [b, others], pairs that are no negatives; whether a
    query's own partner is among them does not matter.
    """
    own = torch.arange(len(queries), device=queries.device)
    left_out = same.to(queries.device, copy=True)
    left_out[own, own] = False
    return cross_entropy((SCALE * queries @ others.T).masked_fill(left_out, float("-inf")), own)


def search(names: np.ndarray, products: Callable[[np.ndarray], np.ndarray], split: str, what: str) -> list[Score]:
    """Scores of searching each member among all others. names: of groups, [members]; products: rows of queries to
    their cosines with all members. Raises DataError where no two belong together."""
    sizes = Counter(names.tolist())
    queries = np.array([row for row, name in enumerate(names) if sizes[name] > 1], dtype=np.int64)
    if not len(queries):
        raise DataError(
            f"data.label: in the {split} split no two {what}s have one label, so nothing can be found there. Give it"
            " more rows, or keep groups in one split with data.split.group."
        )

    def kinds(part: slice) -> np.ndarray:
        found = (names[queries[part], None] == names[None]).astype(np.int8)
        found[np.arange(len(found)), queries[part]] = -1
        return found

    return retrieval(len(queries), lambda part: products(queries[part]), kinds)


def alike(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """Of each vector of length 1 the share of pairs of others that both put in one order of similarity to it; of one
    alone the cosine of both."""
    if len(ours) == 1:
        return np.clip((ours * theirs).sum(1), 0.0, 1.0)
    others = ~np.eye(len(ours), dtype=bool)
    found = zip(ours @ ours.T, theirs @ theirs.T, others)
    return np.array([order(a[kept], b[kept]).mean() for a, b, kept in found])


def _name(cell: object, table: Table, row: int) -> str:
    """The name of a group. Raises DataError for a cell without one."""
    if isinstance(cell, str | int) and not isinstance(cell, bool) and cell != "":
        return str(cell)
    raise DataError(
        f"{table.place('label', row)} holds {shown(cell)} where the name of a group (text or a whole number) is needed."
        " Correct or drop the row, or set data.label to the column with the groups."
    )


def similarities(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T² · mean over examples of KL between softmaxes of their similarities to the others of a batch, times SCALE / T.

    A scalar. student, teacher: unit vectors [batch, …], of sizes of their own.
    """
    logs = []
    for vectors in (student, teacher):
        others = ~torch.eye(len(vectors), dtype=torch.bool, device=vectors.device)
        similar = (vectors @ vectors.T)[others].reshape(len(vectors), -1)
        logs.append(log_softmax(SCALE * similar / temperature, -1))
    ours, theirs = logs
    return (theirs.exp() * (theirs - ours)).sum(-1).mean() * temperature**2
