"""Vectors of texts that are near where the texts belong together: search, duplicates, similarity.

What belongs together is said by one of

    pairs        text, text_pair               or triplets, with `negative`, a text that does not belong to `text`
    groups       text, label                   texts with one label belong together
    scored pairs text, text_pair, score        the higher, the nearer

The vector of a text is the model's last hidden state, pooled as the model says (pooling.py) and of length 1. Pairs and
groups are trained by the contrastive loss over a batch, with u of a text and v of the texts of its batch

    −log exp(20 u·v₊) / Σ_v exp(20 u·v)

where v₊ is its own pair (of a group a member drawn by the seed), and v of other pairs that belong to the text too are
left out; scored pairs by the squared error of u·v to the score, brought to 0..1 by its range in the training split.
Pairs and groups are scored by retrieval (retrieval.py): of pairs among all second texts and negatives of the split, of
groups among all other texts. Scored pairs are scored by the correlation of u·v with the score.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import mse_loss

from mptrain.core.errors import DataError
from mptrain.core.signature import BATCH, MASK, Batch, Outputs, Port, counted_places
from mptrain.data.sources.tables import Table
from mptrain.data.tasks import groups
from mptrain.data.tasks.agreement import array, decisions
from mptrain.data.tasks.arrays import finite
from mptrain.data.tasks.base import Example, Examples, Task
from mptrain.data.tasks.floor import vectorizer
from mptrain.data.tasks.metrics import Score
from mptrain.data.tasks.numbers import CORRELATIONS, correlations, number
from mptrain.data.tasks.pooling import pooled, pooling_of
from mptrain.data.tasks.retrieval import retrieval
from mptrain.data.tasks.text import check_length, examples_of, pad, texts_of, tokenize
from mptrain.recipe import TASKS

_WIDTH = 1024  # of hidden states, for the memory of a batch; the task does not know it


class Embedding(Task):
    """Scores are NDCG@10, MRR and recall@1, 5, 10; of scored pairs Spearman's and Pearson's correlation.

    `texts`: {split: the texts by field}, for the floor. `labels`: None, for a vector's places have no names.
    """

    kind = TASKS["embedding"]
    measures = CORRELATIONS

    def __init__(self, tables: Mapping[str, Table], spec: Any, processor: Any, *args: Any) -> None:
        self.pooling = pooling_of(processor.name_or_path)
        self.texts: dict[str, dict[str, list[str]]] = {}
        self._about: dict[str, np.ndarray] = {}
        super().__init__(tables, spec, processor, *args)
        self.facts["pooling"] = " + ".join(self.pooling)

    @classmethod
    def group(cls, table: Table) -> str | None:
        """The field whose values never cross splits."""
        return groups.kept_apart(table)

    def index_labels(self, tables: Mapping[str, Table]) -> None:
        given = set(tables["train"].columns) & {"text_pair", "negative", "score", "label"}
        if given not in ({"text_pair"}, {"text_pair", "negative"}, {"text_pair", "score"}, {"label"}):
            raise DataError(
                f"data: an embedding learns from text with text_pair (and negative, or score), or from text with label;"
                f" the recipe names {', '.join(['text', *sorted(given)])}. Name the columns of one of these."
            )
        self.shape = "groups" if "label" in given else "scored" if "score" in given else "pairs"
        if self.shape == "scored":
            for table in tables.values():
                cells = enumerate(table["score"])
                table.columns["score"] = [number(cell, table, "score", row) for row, cell in cells]
            self._range = min(tables["train"]["score"]), max(tables["train"]["score"])
            if self._range[0] == self._range[1]:
                raise DataError(
                    f"data.score ({tables['train'].where}): every pair has the score {self._range[0]:g}, so there is"
                    " nothing to learn. Set data.score to the column with the scores."
                )
        if self.shape == "groups":
            self.facts["groups_by_label"] = groups.check_names(tables, "text")

    # -- examples and batches

    def encode(self, split: str, table: Table) -> Examples:
        check_length(self.processor, self.spec.max_length)
        fields = [field for field in self.inputs() if field in table.columns]
        self.texts[split] = {field: texts_of(table, field) for field in fields}
        tokens = {}
        for field, texts in self.texts[split].items():
            encoding = tokenize(self.processor, texts, truncation=True, max_length=self.spec.max_length)
            tokens[field] = examples_of(encoding, self.processor)
        numbers: dict[str, int] = {}
        if self.shape == "groups":
            ids = [[numbers.setdefault(name, len(numbers))] for name in table["label"]]
        else:
            rows = zip(*self.texts[split].values())
            ids = [[numbers.setdefault(text, len(numbers)) for text in row] for row in rows]
        self._about[split] = np.array(table["score"] if self.shape == "scored" else ids)
        parts = [list(row) for row in zip(*tokens.values())]
        if self.shape == "groups" and split == "train":
            partners = groups.partners(table["label"], self.seed)
            parts = [[*row, parts[other][0]] for row, other in zip(parts, partners)]
            ids = [row * 2 for row in ids]
        examples: list[Example] = [{"texts": row, "labels": id_} for row, id_ in zip(parts, ids)]
        if self.shape == "scored":
            low, high = self._range
            for example, score in zip(examples, table["score"]):
                example["scores"] = (score - low) / (high - low)
        lengths = [max(len(text["input_ids"]) for text in row) for row in parts]
        cut = [len(text["input_ids"]) == self.spec.max_length for row in tokens.values() for text in row]
        self.facts.setdefault("at_max_length", {})[split] = sum(cut)
        return Examples(examples.__getitem__, lengths)

    def collate(self, examples: list[Example]) -> Batch:
        """All first texts, then all second ones, …; labels: what each is, int64 [texts]; scores float32 [rows]."""
        texts = [e["texts"][part] for part in range(len(examples[0]["texts"])) for e in examples]
        labels = [e["labels"][part] for part in range(len(examples[0]["labels"])) for e in examples]
        batch = pad(texts, self.processor) | {"labels": torch.tensor(labels)}
        if self.shape == "scored":
            batch["scores"] = torch.tensor([e["scores"] for e in examples], dtype=torch.float32)
        return batch

    def example(self, batch: int, length: int) -> Batch:
        longest = [max(e["texts"], key=lambda text: len(text["input_ids"])) for e in self._longest(batch)]
        return pad(longest, self.processor, length)

    def outputs(self) -> tuple[Port, ...]:
        return (Port("last_hidden_state", (BATCH, "tokens", "hidden")),)

    def example_bytes(self, length: int) -> int:
        return 4 * len(self.train[0]["texts"]) * length * _WIDTH

    # -- what is learned

    def loss(self, outputs: Outputs, batch: Batch) -> Tensor:
        vectors = pooled(outputs["last_hidden_state"], batch[MASK], self.pooling)
        if self.shape == "scored":
            ours, theirs = vectors.chunk(2)
            return mse_loss((ours * theirs).sum(1), batch["scores"].to(vectors.device))
        rows = len(vectors) // len(self.train[0]["texts"])
        queries, others = vectors[:rows], vectors[rows:]
        query, other = batch["labels"][:rows, None], batch["labels"][None, rows:]
        # a text that is the query's own, its pair's, or another of its pairs', is no negative
        same = (other == query) | (other == batch["labels"][rows : 2 * rows, None])
        same[:, :rows] |= query == query.T
        return groups.contrastive(queries, others, same)

    def distillation(
        self, student: Outputs, teacher: Outputs, batch: Mapping[str, Tensor], temperature: float
    ) -> Tensor:
        ours, theirs = (pooled(o["last_hidden_state"], batch[MASK], self.pooling) for o in (student, teacher))
        return groups.similarities(ours, theirs, temperature)

    @classmethod
    def agreement(cls, expected: Outputs, got: Outputs, batch: Batch) -> np.ndarray:
        """Of each text the share of pairs of others that both models put in the same order of similarity to it.

        By the mean of the tokens that count, whatever the pooling; of one text alone the cosine of its two vectors. Of
        a bare model without an output to each token, as CLIP's, whether they decide alike.
        """
        if "last_hidden_state" not in expected:
            return decisions(expected, got)
        mask = counted_places(batch, MASK, expected["last_hidden_state"].shape).cpu()
        both = (torch.as_tensor(array(o["last_hidden_state"])) for o in (expected, got))
        ours, theirs = (pooled(hidden, mask).double().numpy() for hidden in both)
        return groups.alike(ours, theirs)

    # -- what it is worth

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[np.ndarray]:
        """The vectors [texts, h] of each row."""
        hidden = torch.from_numpy(finite(outputs, "last_hidden_state"))
        vectors = pooled(hidden, batch[MASK], self.pooling).numpy()
        return list(vectors.reshape(-1, len(indices), vectors.shape[1]).swapaxes(0, 1))

    def score(self, split: str, found: list[np.ndarray]) -> list[Score]:
        vectors = np.stack(found)
        return self._scores(split, lambda part: vectors[:, part], lambda a, b: a @ b.T)

    def _scores(self, split: str, vectors: Any, products: Any) -> list[Score]:
        """vectors(part): of all first texts, or second ones, …; products(a, b): the cosines of all pairs of rows."""
        about = self._about[split]
        if self.shape == "scored":
            ours, theirs = vectors(0), vectors(1)
            parts = [slice(start, start + 512) for start in range(0, len(about), 512)]
            cosines = np.concatenate([np.diagonal(products(ours[p], theirs[p])) for p in parts])
            found = correlations(cosines.astype(np.float64), about)
            return [found["spearman"], found["pearson"]]
        if self.shape == "groups":
            every = vectors(0)
            return groups.search(about[:, 0], lambda rows: products(every[rows], every), split, "text")
        place: dict[int, tuple[int, int]] = {}  # of each candidate, where its text stands first: (part, row)
        for part in range(1, about.shape[1]):
            for row, text in enumerate(about[:, part].tolist()):
                place.setdefault(text, (part, row))
        index = {text: i for i, text in enumerate(place)}
        parts, rows = np.array(list(place.values())).T
        belongs: dict[int, set[int]] = {}
        for own, other in about[:, :2].tolist():
            belongs.setdefault(own, set()).add(index[other])

        def similar(chunk: slice) -> np.ndarray:
            found = np.empty((len(about[chunk]), len(index)))
            for part in range(1, about.shape[1]):
                if (here := parts == part).any():
                    found[:, here] = products(vectors(0)[chunk], vectors(part)[rows[here]])
            return found

        def kind(chunk: slice) -> np.ndarray:
            found = np.zeros((len(about[chunk]), len(index)), dtype=np.int8)
            for row, own in zip(found, about[chunk, 0].tolist()):
                if own in index:
                    row[index[own]] = -1  # the query itself
                row[list(belongs[own])] = 1
            return found

        return retrieval(len(about), similar, kind)

    def floor(self, seed: int) -> Score | None:
        train = [text for texts in self.texts["train"].values() for text in texts]
        words = vectorizer(train)
        if words is None:
            return None
        rows = [words.transform(texts) for texts in self.texts["test"].values()]
        return self._scores("test", lambda part: rows[part], lambda a, b: (a @ b.T).toarray())[0]
