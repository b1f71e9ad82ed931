"""Classes of a text or of a pair of texts."""

from __future__ import annotations

from mptrain.data.sources.tables import Table
from mptrain.data.tasks.base import Batch, Example, Examples, without_targets
from mptrain.data.tasks.classification import ClassificationData
from mptrain.data.tasks.text import check_length, examples_of, pad, texts_of, tokenize


class TextClassificationData(ClassificationData):
    task = "text-classification"
    columns = {"text": "text", "text_pair": None, "label": "label"}
    inputs = ("text", "text_pair")

    def encode(self, split: str, table: Table) -> Examples:
        check_length(self.processor, self.spec.max_length)
        texts = [texts_of(table, field) for field in self.inputs if field in table.columns]
        targets = self.targets(split, table)
        encoding = tokenize(self.processor, *texts, truncation=True, max_length=self.spec.max_length)
        examples = examples_of(encoding, self.processor)
        for example, target in zip(examples, targets):
            example["labels"] = target
        lengths = [len(e["input_ids"]) for e in examples]
        # A text as long as the limit may just fit; nearly always it was cut.
        self.facts.setdefault("at_max_length", {})[split] = sum(n == self.spec.max_length for n in lengths)
        self.texts = {**(self.texts or {}), split: ([" ".join(pair) for pair in zip(*texts)], targets)}
        return Examples(examples.__getitem__, lengths)

    def collate(self, examples: list[Example]) -> Batch:
        return pad(examples, self.processor)

    def example(self, batch: int, length: int) -> Batch:
        return without_targets(pad(self._longest(batch), self.processor, length))
