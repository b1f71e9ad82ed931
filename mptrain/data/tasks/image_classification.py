"""Classes of pictures, read and scaled by the model's image processor when they are needed, and each once before."""

from __future__ import annotations

import torch

from mptrain.data.sources.tables import Table
from mptrain.data.tasks import pictures
from mptrain.data.tasks.arrays import stack
from mptrain.data.tasks.base import Batch, Example, Examples
from mptrain.data.tasks.classification import Classification
from mptrain.recipe import TASKS


class ImageClassification(Classification):
    kind = TASKS["image-classification"]

    @classmethod
    def identity(cls, table: Table) -> list[str]:
        return pictures.digests(table, "image")

    def encode(self, split: str, table: Table) -> Examples:
        targets = self.targets(split, table)
        pictures.check(table, "image", split)

        def get(index: int) -> Example:
            pixels = self.processor(images=pictures.read_image(table, "image", index), return_tensors="np")
            return {"pixel_values": pixels["pixel_values"][0], "labels": targets[index]}

        return Examples(get, [1] * len(table))

    def collate(self, examples: list[Example]) -> Batch:
        return {
            "pixel_values": stack([e["pixel_values"] for e in examples], 0).float(),
            "labels": torch.tensor([e["labels"] for e in examples]),
        }

    def example(self, batch: int, length: int) -> Batch:
        """pixel_values [batch, channels, height, width]; `length` means nothing for pictures."""
        return self.without_targets(self.collate(self._longest(batch)))
