"""Vectors of pictures that are near where they show the same: search by picture, duplicates.

Pictures with one `label` belong together. The vector is the model's output `embedding` [batch, size], brought to length
1; learning, by pairs of one label, and scoring, by search of each picture among all others, are those of groups.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from mptrain.core.signature import BATCH, Batch, Outputs, Port
from mptrain.data.sources.tables import Table
from mptrain.data.tasks import groups, pictures
from mptrain.data.tasks.agreement import array
from mptrain.data.tasks.arrays import finite, stack
from mptrain.data.tasks.base import Example, Examples, Task
from mptrain.data.tasks.metrics import Score
from mptrain.recipe import TASKS


class ImageEmbedding(Task):
    """Scores are NDCG@10, MRR and recall@1, 5, 10. `labels`: None, for a vector's places have no names."""

    kind = TASKS["image-embedding"]

    @classmethod
    def identity(cls, table: Table) -> list[str]:
        return pictures.digests(table, "image")

    @classmethod
    def group(cls, table: Table) -> str | None:
        """The field whose values never cross splits."""
        return groups.kept_apart(table)

    def index_labels(self, tables: Mapping[str, Table]) -> None:
        self._names: dict[str, np.ndarray] = {}
        self.facts["groups_by_label"] = groups.check_names(tables, "picture")

    def encode(self, split: str, table: Table) -> Examples:
        pictures.check(table, "image", split)
        numbers = {name: number for number, name in enumerate(dict.fromkeys(table["label"]))}
        labels = [numbers[name] for name in table["label"]]
        self._names[split] = np.array(labels)
        partners = groups.partners(table["label"], self.seed) if split == "train" else None

        def pixels(row: int) -> np.ndarray:
            found = self.processor(images=pictures.read_image(table, "image", row), return_tensors="np")
            return found["pixel_values"][0]

        def get(index: int) -> Example:
            rows = [index] if partners is None else [index, partners[index]]
            return {"pictures": [pixels(row) for row in rows], "labels": labels[index]}

        return Examples(get, [1] * len(table))

    def collate(self, examples: list[Example]) -> Batch:
        """All pictures, then, of training, all their partners; labels: int64, one to each."""
        parts = range(len(examples[0]["pictures"]))
        return {
            "pixel_values": stack([e["pictures"][part] for part in parts for e in examples], 0).float(),
            "labels": torch.tensor([e["labels"] for _ in parts for e in examples]),
        }

    def example(self, batch: int, length: int) -> Batch:
        """pixel_values [batch, channels, height, width]; `length` means nothing for pictures."""
        return {"pixel_values": stack([e["pictures"][0] for e in self._longest(batch)], 0).float()}

    def outputs(self) -> tuple[Port, ...]:
        return (Port(self.kind.output, (BATCH, "size")),)

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        vectors = self._vectors(outputs)
        rows, labels = len(vectors) // 2, batch["labels"]
        return groups.contrastive(vectors[:rows], vectors[rows:], labels[:rows, None] == labels[None, rows:])

    def distillation(
        self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        return groups.similarities(self._vectors(student), self._vectors(teacher), temperature)

    @classmethod
    def agreement(cls, expected: Outputs, got: Outputs, batch: Batch) -> np.ndarray:
        """Of each picture the share of pairs of others that both models put in the same order of similarity to it."""
        ours, theirs = (cls._vectors(o).double().numpy() for o in (expected, got))
        return groups.alike(ours, theirs)

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[np.ndarray]:
        """The vectors, of training without the partners."""
        return list(normalize(torch.from_numpy(finite(outputs, self.kind.output)), dim=-1).numpy()[: len(indices)])

    def score(self, split: str, found: list[np.ndarray]) -> list[Score]:
        vectors = np.stack(found)
        return groups.search(self._names[split], lambda rows: vectors[rows] @ vectors.T, split, "picture")

    @classmethod
    def _vectors(cls, outputs: Outputs) -> Tensor:
        found = outputs[cls.kind.output]
        return normalize((found if isinstance(found, Tensor) else torch.as_tensor(array(found))).float(), dim=-1)
