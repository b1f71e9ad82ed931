"""A tag for every word, such as BIO entity tags.

Words are cut into pieces by the tokenizer; the first piece of a word carries its tag, the other
pieces and special tokens are ignored. Scores are over whole sentences as written: a word that was
cut off by max_length counts as predicted O.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np

from mptrain.core.errors import DataError
from mptrain.core.signature import BATCH, Port
from mptrain.data.sources.quoting import shown
from mptrain.data.sources.tables import Table, check_unicode
from mptrain.data.tasks.arrays import finite
from mptrain.data.tasks.base import IGNORED, Batch, Example, Examples, Outputs, Task
from mptrain.data.tasks.labels import Column, classes_of
from mptrain.data.tasks.metrics import F1, RATIO, Score, span_counts
from mptrain.data.tasks.text import check_length, examples_of, pad, tokenize
from mptrain.data.tasks.vocabulary import note_unknown
from mptrain.recipe import TASKS

OUTSIDE = "O"


class TokenClassification(Task):
    """Scores are entity F1 (micro-averaged over spans), then accuracy over words."""

    kind = TASKS["token-classification"]
    labels: list[str]

    def index_labels(self, tables: Mapping[str, Table]) -> list[str]:
        self._tags: dict[str, list[list[int]]] = {}
        self._tagged: dict[str, list[np.ndarray]] = {}
        for table in tables.values():
            for field in self.kind.columns:
                table.columns[field] = [_items(cell, field, row, table) for row, cell in enumerate(table[field])]
            for row, (words, tags) in enumerate(zip(table["tokens"], table["tags"])):
                if len(words) != len(tags):
                    raise DataError(
                        f"{table.place('tags', row)} has {len(words)} words but {len(tags)} tags;"
                        " there must be one tag for each word."
                    )
        train = tables["train"]
        declared = train.classes.get("tags")
        every, _ = _flat(train)
        if declared is None and not all(isinstance(tag, str) for tag in every):
            raise DataError(
                f"data.tags: {train.where} has numbers for tags and does not say what they stand for. Give tags as"
                " text (B-PER, I-PER, O), or a `datasets` folder whose column has class names."
            )
        columns = {
            split: Column(*_flat(table), table.classes.get("tags"), f"data.tags ({table.where})")
            for split, table in tables.items()
        }
        found = classes_of(columns, self.spec.labels, "data.tags")
        for split, table in tables.items():
            flat = iter(found.indices[split])
            table.columns["tags"] = [[next(flat) for _ in tags] for tags in table["tags"]]
        self.facts["labels"] = found.counts
        self.unseen = found.unseen
        return found.names

    def encode(self, split: str, table: Table) -> Examples:
        check_length(self.processor, self.spec.max_length)
        encoding = tokenize(
            self.processor,
            table["tokens"],
            is_split_into_words=True,
            truncation=True,
            max_length=self.spec.max_length,
        )
        note_unknown(self, split, encoding, [" ".join(words) for words in table["tokens"]])
        examples = examples_of(encoding, self.processor)
        self._tags[split] = table["tags"]
        self._tagged[split] = []
        for row, (example, tags) in enumerate(zip(examples, table["tags"])):
            words = encoding.word_ids(row)
            first = [i for i, word in enumerate(words) if word is not None and word not in words[max(0, i - 1) : i]]
            labels = np.full(len(words), IGNORED, dtype=np.int32)
            labels[first] = [tags[words[i]] for i in first]
            example["labels"] = labels
            self._tagged[split].append(np.array([words[i] for i in first], dtype=np.int64))
        self.facts.setdefault("words_cut_off", {})[split] = sum(map(len, table["tags"])) - sum(
            map(len, self._tagged[split])
        )
        return Examples(examples.__getitem__, [len(e["input_ids"]) for e in examples])

    def collate(self, examples: list[Example]) -> Batch:
        return pad(examples, self.processor)

    def example(self, batch: int, length: int) -> Batch:
        return self.without_targets(pad(self._longest(batch), self.processor, length))

    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, "tokens", len(self.labels))),)

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[np.ndarray]:
        best = finite(outputs).argmax(axis=-1)
        first = batch["labels"].numpy() != IGNORED
        return [row[mask] for row, mask in zip(best, first)]

    def score(self, split: str, found: list[np.ndarray]) -> list[Score]:
        spans, words, names = [], [], [*self.labels, *self.unseen]
        for guesses, places, tags in zip(found, self._tagged[split], self._tags[split]):
            predicted = [OUTSIDE] * len(tags)
            for guess, place in zip(guesses, places):
                predicted[place] = self.labels[guess]
            gold = [names[tag] for tag in tags]
            spans.append(span_counts(predicted, gold))
            words.append((sum(a == b for a, b in zip(predicted, gold)), len(gold)))
        return [
            Score("f1", np.array(spans, dtype=np.float64), F1),
            Score("accuracy", np.array(words, dtype=np.float64), RATIO),
        ]


def _flat(table: Table) -> tuple[list, list[int]]:
    """All tags of a table, and the number of each one's row in the source."""
    rows = [number for number, tags in zip(table.rows, table["tags"]) for _ in tags]
    return list(chain.from_iterable(table["tags"])), rows


def _items(cell: Any, field: str, row: int, table: Table) -> list:
    """A list cell, or a text cell split at spaces (a csv holds no lists)."""
    items = cell.split() if isinstance(cell, str) else cell
    if not isinstance(items, list) or not items or (field == "tokens" and not all(isinstance(i, str) for i in items)):
        raise DataError(
            f"{table.place(field, row)} holds {shown(cell)} where a list of {field} is needed"
            " (or one text with spaces between them). Correct the row or set the column."
        )
    if field == "tokens":
        check_unicode(" ".join(items), table.place(field, row))
    return items
