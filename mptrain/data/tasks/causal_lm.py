"""Next-token prediction over running text.

The rows of a split, joined by blank lines (the lines of a text file as they are), are one stream of
N tokens, with special tokens at its ends only. Window k starts at token k·stride and is max_length
long; of the tokens it predicts, those that an earlier window has predicted count no more. So every
token but the first is predicted exactly once, and after the first window with at least
max_length − stride tokens before it (Hugging Face's guide "Perplexity of fixed-length models", whose
stride is half the window too; it weighs a window by one token less than it predicts, here every token
weighs the same). Training windows follow each other without overlap.

    loss = Σ nll / Σ tokens          perplexity = exp(loss)
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import cross_entropy

from mptrain.core.errors import DataError, MptrainError
from mptrain.core.signature import BATCH, Port
from mptrain.data.sources.splits import sample
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.base import IGNORED, Batch, Example, Examples, Outputs, Task
from mptrain.data.tasks.metrics import EXP_RATIO, RATIO, Score
from mptrain.data.tasks.text import check_length, pad, texts_of, tokenize
from mptrain.data.tasks.vocabulary import note_unknown
from mptrain.recipe import TASKS


class CausalLm(Task):
    """Examples are windows; scores are loss (nats per token), then perplexity."""

    kind = TASKS["causal-lm"]
    in_order = True

    def encode(self, split: str, table: Table) -> Examples:
        length = self.spec.max_length
        check_length(self.processor, length)
        if length < 2:
            raise DataError(f"data.max_length: a window of {length} token predicts nothing; give at least 2.")
        stride = self.spec.stride if self.spec.stride is not None else length // 2
        if stride >= length:
            raise DataError(
                f"data.stride: {stride} is not below data.max_length ({length}): a window does not predict its first"
                f" token, so tokens would be left out. Give at most {length - 1}."
            )
        text = table.separator.join(texts_of(table, "text"))
        encoding = tokenize(self.processor, text)
        note_unknown(self, split, encoding, [text])
        stream = encoding["input_ids"]
        if len(stream) < 2:
            raise DataError(f"data.text: {table.where} has {len(stream)} tokens; predicting needs at least two.")
        windows = _windows(np.asarray(stream, dtype=np.int32), length, length if split == "train" else stride)
        windows = [windows[i] for i in sample(len(windows), self.spec.max_samples)]
        self.facts.setdefault("tokens", {})[split] = len(stream)
        self.facts["perplexity"] = {"window": length, "stride": stride}
        return Examples(windows.__getitem__, [len(w["input_ids"]) for w in windows])

    def collate(self, examples: list[Example]) -> Batch:
        return pad(examples, self.processor, side="right")  # a causal model never sees what comes after

    def example(self, batch: int, length: int) -> Batch:
        return self.without_targets(pad(self._longest(batch), self.processor, length, "right"))

    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, "tokens", "vocabulary")),)

    def example_bytes(self, length: int) -> int:
        return 4 * length * len(self.processor)

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[tuple[float, int]]:
        """(summed nll, predicted tokens) of each window."""
        logits, labels = torch.as_tensor(outputs["logits"]), batch["labels"]
        found = []
        for row, target in zip(logits, labels):
            # A row at a time: in float32, the logits of a whole batch of a large vocabulary are gigabytes.
            loss = cross_entropy(row[:-1].float(), target[1:].to(row.device), ignore_index=IGNORED, reduction="none")
            total = float(loss.double().sum())
            if not np.isfinite(total):
                raise MptrainError("The model's logits are not finite, so it cannot be scored; see its training loss.")
            found.append((total, int((target[1:] != IGNORED).sum())))
        return found

    def score(self, split: str, found: list[tuple[float, int]]) -> list[Score]:
        stats = np.array(found, dtype=np.float64)
        return [
            Score("loss", stats, RATIO, "number", higher_is_better=False),
            Score("perplexity", stats, EXP_RATIO, "number", higher_is_better=False),
        ]


def _windows(stream: np.ndarray, length: int, stride: int) -> list[Example]:
    """Windows over `stream` [n] with labels IGNORED where an earlier window has predicted the token."""
    windows = []
    predicted = 0  # tokens before this one have been a target, or never can be
    for start in range(0, len(stream), stride):
        ids = stream[start : start + length]
        if start + len(ids) <= predicted or len(ids) < 2:
            break
        labels = ids.copy()
        labels[: max(0, predicted - start)] = IGNORED
        predicted = start + len(ids)
        windows.append({"input_ids": ids, "attention_mask": np.ones_like(ids), "labels": labels})
    return windows
