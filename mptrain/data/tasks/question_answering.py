"""The span of a context that answers a question, as in SQuAD.

A long context is read in windows of max_length tokens that overlap by `stride`. A window learns the
span of the first answer if it holds all of it, else it points at its [CLS] token c, as does a
question without answer. The predicted answer is, over all windows of an example,

    argmax_{i <= j < i + 30} start_i + end_j     with i, j tokens of the context

and "" when the data has questions without answer and start_c + end_c is higher than that.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mptrain.core.errors import DataError
from mptrain.core.signature import BATCH, Port
from mptrain.data.sources.quoting import shown
from mptrain.data.sources.splits import SPLITS
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.arrays import finite
from mptrain.data.tasks.base import Batch, Example, Examples, Outputs, Task
from mptrain.data.tasks.metrics import MEAN, Score, answer_scores
from mptrain.data.tasks.text import check_length, examples_of, pad, texts_of, tokenize
from mptrain.data.tasks.vocabulary import note_unknown
from mptrain.recipe import TASKS

LONGEST_ANSWER = 30
"""tokens, as in SQuAD's reference implementations"""


@dataclass(frozen=True)
class Window:
    row: int
    """of the question in its split"""
    nothing: int
    """token that stands for no answer: [CLS], wherever the tokenizer puts it"""
    offsets: np.ndarray
    """int32 [s, 2], first character and last + 1 in the context; -1 for tokens outside it"""


class QuestionAnswering(Task):
    """Examples are windows, scores are per question: F1 over words, then exact match."""

    kind = TASKS["question-answering"]

    def index_labels(self, tables: Mapping[str, Table]) -> None:
        for table in tables.values():
            pairs = zip(table["answers"], table["context"])
            table.columns["answers"] = [_answers(cell, text, i, table) for i, (cell, text) in enumerate(pairs)]
        self._unanswerable = any(not answers for name in SPLITS for answers in tables[name]["answers"])
        self._windows: dict[str, list[Window]] = {}
        self._rows: dict[str, Table] = {}

    def encode(self, split: str, table: Table) -> Examples:
        limit = self.spec.max_length
        check_length(self.processor, limit)
        overlap = self.spec.stride if self.spec.stride is not None else limit // 3
        questions = [question.strip() for question in texts_of(table, "question")]
        self._check_room(questions, table, limit, overlap)
        encoding = tokenize(
            self.processor,
            questions,
            texts_of(table, "context"),
            truncation="only_second",
            max_length=limit,
            stride=overlap,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
        note_unknown(self, split, encoding, table["context"])
        examples = examples_of(encoding, self.processor)
        windows = []
        for i, (example, row) in enumerate(zip(examples, encoding["overflow_to_sample_mapping"])):
            in_context = np.array([part == 1 for part in encoding.sequence_ids(i)])
            offsets = np.where(in_context[:, None], np.array(encoding["offset_mapping"][i], dtype=np.int32), -1)
            nothing = _nothing(example["input_ids"], self.processor)
            windows.append(Window(row, nothing, offsets))
            target = _target(offsets, table["answers"][row]) or (nothing, nothing)
            example["start_positions"], example["end_positions"] = target
        self._windows[split], self._rows[split] = windows, table
        return Examples(examples.__getitem__, [len(e["input_ids"]) for e in examples])

    def _check_room(self, questions: Sequence[str], table: Table, limit: int, overlap: int) -> None:
        lengths = [len(ids) for ids in tokenize(self.processor, questions, add_special_tokens=False)["input_ids"]]
        room = limit - max(lengths) - self.processor.num_special_tokens_to_add(pair=True)
        if room <= overlap:
            row = lengths.index(max(lengths))
            raise DataError(
                f"data.max_length: {limit} leaves {max(room, 0)} tokens for the context beside the question of row"
                f" {table.rows[row]} of {table.where} ({lengths[row]} tokens), and windows overlap by {overlap}. Raise"
                " data.max_length or lower data.stride."
            )

    def collate(self, examples: list[Example]) -> Batch:
        batch = pad(examples, self.processor)
        if self.processor.padding_side == "left":
            before = torch.tensor([batch["input_ids"].shape[1] - len(e["input_ids"]) for e in examples])
            batch |= {name: batch[name] + before for name in ("start_positions", "end_positions")}
        return batch

    def row_of(self, split: str, index: int) -> int:
        return self._windows[split][index].row

    def example(self, batch: int, length: int) -> Batch:
        return self.without_targets(pad(self._longest(batch), self.processor, length))

    def outputs(self) -> tuple[Port, ...]:
        return (Port("start_logits", (BATCH, "tokens")), Port("end_logits", (BATCH, "tokens")))

    def read(
        self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]
    ) -> list[tuple[float, int, int, float]]:
        """(score, first character, last + 1) of the best span of each window, and the score of no answer."""
        starts, ends = finite(outputs, "start_logits"), finite(outputs, "end_logits")
        found = []
        for start, end, index in zip(starts, ends, indices):
            window = self._windows[split][index]
            offsets, nothing = window.offsets, window.nothing
            own = slice(-len(offsets), None) if self.processor.padding_side == "left" else slice(len(offsets))
            start, end = start[own], end[own]
            score, first, last = _best_span(start, end, offsets[:, 0] >= 0)
            none = float(start[nothing]) + float(end[nothing])
            found.append((score, int(offsets[first, 0]), int(offsets[last, 1]), none))
        return found

    def score(self, split: str, found: list[tuple[float, int, int, float]]) -> list[Score]:
        table = self._rows[split]
        best: list[tuple[float, int, int]] = [(-np.inf, 0, 0)] * len(table)
        nothing = [np.inf] * len(table)
        for window, (score, first, last, none) in zip(self._windows[split], found):
            best[window.row] = max(best[window.row], (score, first, last), key=lambda span: span[0])
            nothing[window.row] = min(nothing[window.row], none)
        stats = []
        for (score, first, last), none, context, answers in zip(best, nothing, table["context"], table["answers"]):
            text = "" if self._unanswerable and none > score else context[first:last]
            stats.append(answer_scores(text, [answer["text"] for answer in answers]))
        columns = np.array(stats, dtype=np.float64)
        return [Score("f1", columns[:, :1], MEAN), Score("exact_match", columns[:, 1:], MEAN)]


def _best_span(start: np.ndarray, end: np.ndarray, allowed: np.ndarray) -> tuple[float, int, int]:
    """The highest start_i + end_j with i <= j < i + LONGEST_ANSWER among allowed tokens; logits [s]."""
    start, end = np.where(allowed, start, -np.inf), np.where(allowed, end, -np.inf)
    padded = np.concatenate([end, np.full(LONGEST_ANSWER - 1, -np.inf)])
    sums = start[:, None] + np.lib.stride_tricks.sliding_window_view(padded, LONGEST_ANSWER)
    first, distance = np.unravel_index(int(sums.argmax()), sums.shape)
    return float(sums[first, distance]), int(first), int(first + distance)


def _nothing(ids: np.ndarray, tokenizer: Any) -> int:
    """The place of [CLS], which XLNet has at the end; the first token where there is none."""
    return int(np.argmax(ids == tokenizer.cls_token_id)) if tokenizer.cls_token_id is not None else 0


def _target(offsets: np.ndarray, answers: Sequence[Mapping[str, Any]]) -> tuple[int, int] | None:
    """Token positions of the first answer; None when the window lacks a part of it."""
    if not answers:
        return None
    begin = answers[0]["answer_start"]
    end = begin + len(answers[0]["text"])
    inside = offsets[:, 0] >= 0
    tokens = np.flatnonzero(inside & (offsets[:, 1] > begin) & (offsets[:, 0] < end))
    if not len(tokens) or offsets[inside, 0].min() > begin or offsets[inside, 1].max() < end:
        return None
    return int(tokens[0]), int(tokens[-1])


def _answers(cell: Any, context: Any, row: int, table: Table) -> list[dict[str, Any]]:
    """Answers as [{"text", "answer_start"}], from SQuAD's two layouts or either as JSON text."""
    try:
        value = json.loads(cell) if isinstance(cell, str) else cell
        if isinstance(value, dict):
            value = [{"text": t, "answer_start": s} for t, s in zip(value["text"], value["answer_start"], strict=True)]
        answers: list[dict[str, Any]] = [
            {"text": str(a["text"]), "answer_start": int(a["answer_start"])} for a in value
        ]
    except (TypeError, ValueError, KeyError):
        raise DataError(
            f"{table.place('answers', row)} holds {shown(cell)}; answers look like"
            ' {"text": ["Paris"], "answer_start": [17]}. Correct the row or set data.answers.'
        ) from None
    for answer in answers:
        begin = answer["answer_start"]
        if not answer["text"] or str(context)[begin : begin + len(answer["text"])] != answer["text"]:
            raise DataError(
                f"{table.place('answers', row)}: the context does not hold {shown(answer['text'])} at"
                f" character {begin} (it has {shown(str(context)[max(0, begin) :][:40])} there). Correct answer_start."
            )
    return answers
