"""Classes of a text or of a pair of texts."""

from __future__ import annotations

from collections.abc import Mapping

from mptrain.data.sources.tables import Table
from mptrain.data.tasks.base import Batch, Example, Examples
from mptrain.data.tasks.classification import Classification
from mptrain.data.tasks.floor import tfidf_classifier
from mptrain.data.tasks.metrics import Score
from mptrain.data.tasks.text import check_length, examples_of, pad, texts_of, tokenize
from mptrain.recipe import TASKS


class TextClassification(Classification):
    """`texts`: for the floor, {split: (texts, class indices)}."""

    kind = TASKS["text-classification"]

    def index_labels(self, tables: Mapping[str, Table]) -> list[str]:
        self.texts: dict[str, tuple[list[str], list[int]]] = {}
        return super().index_labels(tables)

    def encode(self, split: str, table: Table) -> Examples:
        check_length(self.processor, self.spec.max_length)
        texts = [texts_of(table, field) for field in self.inputs() if field in table.columns]
        targets = self.targets(split, table)
        encoding = tokenize(self.processor, *texts, truncation=True, max_length=self.spec.max_length)
        examples = examples_of(encoding, self.processor)
        for example, target in zip(examples, targets):
            example["labels"] = target
        lengths = [len(e["input_ids"]) for e in examples]
        # A text as long as the limit may just fit; nearly always it was cut.
        self.facts.setdefault("at_max_length", {})[split] = sum(n == self.spec.max_length for n in lengths)
        self.texts[split] = [" ".join(pair) for pair in zip(*texts)], targets
        return Examples(examples.__getitem__, lengths)

    def collate(self, examples: list[Example]) -> Batch:
        return pad(examples, self.processor)

    def example(self, batch: int, length: int) -> Batch:
        return self.without_targets(pad(self._longest(batch), self.processor, length))

    def floor(self, seed: int) -> Score | None:
        return tfidf_classifier(self.texts, seed)
