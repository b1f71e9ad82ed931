"""One text, or a pair of them, to each row, and a target to each: what the tasks of `text` and `text_pair` share."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from mptrain.data.sources.tables import Table
from mptrain.data.tasks.base import Batch, Example, Examples, Task
from mptrain.data.tasks.text import check_length, examples_of, pad, texts_of, tokenize
from mptrain.data.tasks.vocabulary import note_unknown


class TextTask(Task):
    """`texts`: {split: (texts, targets)} for the floor, pairs joined by a space."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.texts: dict[str, tuple[list[str], Sequence[Any]]] = {}
        super().__init__(*args, **kwargs)

    def encode(self, split: str, table: Table) -> Examples:
        check_length(self.processor, self.spec.max_length)
        texts = [texts_of(table, field) for field in self.inputs() if field in table.columns]
        encoding = tokenize(self.processor, *texts, truncation=True, max_length=self.spec.max_length)
        note_unknown(self, split, encoding, [text for pair in zip(*texts) for text in pair])
        examples = examples_of(encoding, self.processor)
        targets = self.targets(split, table)
        for example, target in zip(examples, targets, strict=True):
            example["labels"] = target
        lengths = [len(e["input_ids"]) for e in examples]
        # A text as long as the limit may just fit; nearly always it was cut.
        self.facts.setdefault("at_max_length", {})[split] = sum(n == self.spec.max_length for n in lengths)
        self.texts[split] = [" ".join(pair) for pair in zip(*texts)], targets
        return Examples(examples.__getitem__, lengths)

    @abstractmethod
    def targets(self, split: str, table: Table) -> Sequence[Any]:
        """The target of each row, remembered for `score`."""

    def collate(self, examples: list[Example]) -> Batch:
        return pad(examples, self.processor)

    def example(self, batch: int, length: int) -> Batch:
        return self.without_targets(pad(self._longest(batch), self.processor, length))
