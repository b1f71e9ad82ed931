"""A text in, a text out, by an encoder and a decoder: summaries, translations, dates written in another form.

In training and for the loss the decoder reads the target itself, one place later and behind the start token of the
model's config (teacher forcing). The other scores are of what the model writes on its own, each time the likeliest
token, until its end token or as many tokens as the longest target has:

    rouge_l      F1 over the longest common subsequence of words (Lin 2004), as rouge-score counts it
    chrf         F2 over character n-grams up to 6 (Popović 2015), as sacrebleu counts it, of each text; then the mean
    exact_match  the text is the target, but for spaces at its ends
    loss         Σ nll / Σ tokens of the targets
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoConfig

from mptrain.core.errors import DataError, ModelError, MptrainError, UserError
from mptrain.core.signature import BATCH, Batch, Outputs, Port, Signature, counted_places
from mptrain.data.sources.tables import Table
from mptrain.data.tasks import agreement
from mptrain.data.tasks.arrays import stack
from mptrain.data.tasks.base import IGNORED, Example, Examples, Task
from mptrain.data.tasks.metrics import MEAN, RATIO, Score
from mptrain.data.tasks.text import check_length, examples_of, pad, texts_of, tokenize
from mptrain.data.tasks.vocabulary import note_unknown
from mptrain.recipe import TASKS

DECODER = "decoder_"
IDS, MASK = f"{DECODER}input_ids", f"{DECODER}attention_mask"
WRITTEN = "written"
"""of the outputs that `read` gets: token ids [b, n] that the model chose itself, padded behind its end token"""
_DECODED = "decoder_tokens"


class Seq2Seq(Task):
    """Scores are ROUGE-L, chrF, exact match and the loss."""

    kind = TASKS["seq2seq"]

    def __init__(self, tables: Mapping[str, Table], spec: Any, processor: Any, *args: Any) -> None:
        self.start, self.end = _start(processor), _end(processor)
        self.targets: dict[str, list[str]] = {}
        self._scorers()  # a missing package is said before anything is read
        super().__init__(tables, spec, processor, *args)

    def encode(self, split: str, table: Table) -> Examples:
        length = self.spec.max_length
        check_length(self.processor, length)
        sources, targets = texts_of(table, "text"), texts_of(table, "target")
        empty = next((row for row, text in enumerate(targets) if not text.strip()), None)
        if empty is not None:
            raise DataError(f"{table.place('target', empty)} is empty, so there is nothing to write. Drop the row.")
        encoding = tokenize(self.processor, sources, truncation=True, max_length=length)
        note_unknown(self, split, encoding, sources)
        examples = examples_of(encoding, self.processor)
        wanted = tokenize(self.processor, text_target=targets, truncation=True, max_length=length)["input_ids"]
        for example, ids in zip(examples, wanted, strict=True):
            ids = ids if ids[-1] == self.end else [*ids[: length - 1], self.end]
            example["labels"] = np.asarray(ids, dtype=np.int32)
        self.targets[split] = targets
        sizes = [len(example["input_ids"]) for example in examples]
        self.facts.setdefault("at_max_length", {})[split] = sum(size == length for size in sizes)
        longest = max((len(example["labels"]) for example in examples), default=1)
        self.facts.setdefault("longest_target", {})[split] = longest
        return Examples(examples.__getitem__, sizes)

    def collate(self, examples: list[Example]) -> Batch:
        labels = stack([example["labels"] for example in examples], IGNORED).long()
        return self._sources(examples) | self._forced(labels) | {"labels": labels}

    def example(self, batch: int, length: int) -> Batch:
        """The target has the length of the text."""
        examples = self._longest(batch)
        labels = stack([example["labels"] for example in examples], IGNORED, length).long()
        return self._sources(examples, length) | self._forced(labels)

    def _sources(self, examples: Sequence[Example], length: int | None = None) -> Batch:
        return pad([{k: v for k, v in e.items() if k != "labels"} for e in examples], self.processor, length)

    def _forced(self, labels: Tensor) -> Batch:
        """What the decoder reads so that it predicts `labels` [b, n]."""
        ids = torch.where(labels == IGNORED, self.processor.pad_token_id, labels).roll(1, 1)
        ids[:, 0] = self.start
        return {IDS: ids, MASK: (labels != IGNORED).long()}

    def outputs(self) -> tuple[Port, ...]:
        return (Port("logits", (BATCH, _DECODED, "vocabulary")),)

    def signature(self, accepted: Collection[str] | None = None) -> Signature:
        found = super().signature(accepted)
        inputs = (replace(p, axes=(BATCH, _DECODED)) if p.name.startswith(DECODER) else p for p in found.inputs)
        return replace(found, inputs=tuple(inputs))

    def example_bytes(self, length: int) -> int:
        return 4 * max(length, *self.facts["longest_target"].values()) * len(self.processor)

    def answers(self, forward: Callable[[Batch], Outputs], batch: Batch) -> Outputs:
        return {**forward(batch), WRITTEN: self._written(forward, batch)}

    def _written(self, forward: Callable[[Batch], Outputs], batch: Batch) -> np.ndarray:
        rows, pads = len(batch["input_ids"]), self.processor.pad_token_id
        ids, going = torch.full((rows, 1), self.start), torch.ones(rows, dtype=torch.bool)
        for _ in range(max(self.facts["longest_target"].values())):
            logits = forward({**batch, IDS: ids, MASK: torch.ones_like(ids)})["logits"]
            following = torch.as_tensor(agreement.array(logits[:, -1]).argmax(-1))
            ids = torch.cat([ids, torch.where(going, following, pads)[:, None]], 1)
            going &= following != self.end
            if not going.any():
                break
        return ids[:, 1:].numpy()

    def read(self, outputs: Outputs, batch: Batch, split: str, indices: Sequence[int]) -> list[tuple[float, ...]]:
        """(summed nll, tokens, ROUGE-L, chrF, whether it is the target) of each row."""
        rouge, chrf = self._scorers()
        texts = self.processor.batch_decode(outputs[WRITTEN], skip_special_tokens=True)
        found: list[tuple[float, ...]] = []
        for row, labels, text, index in zip(outputs["logits"], batch["labels"], texts, indices, strict=True):
            logits = torch.as_tensor(row).float().cpu()
            total = float(cross_entropy(logits, labels.cpu(), ignore_index=IGNORED, reduction="sum").double())
            if not np.isfinite(total):
                raise MptrainError("The model's logits are not finite, so it cannot be scored; see its training loss.")
            target = self.targets[split][index]
            exact = float(text.strip() == target.strip())
            count = float((labels != IGNORED).sum())
            found.append((total, count, rouge(text, target), chrf(text, target), exact))
        return found

    def score(self, split: str, found: list[tuple[float, ...]]) -> list[Score]:
        stats = np.array(found, dtype=np.float64)
        return [
            Score("rouge_l", stats[:, 2:3], MEAN),
            Score("chrf", stats[:, 3:4], MEAN),
            Score("exact_match", stats[:, 4:5], MEAN),
            Score("loss", stats[:, :2], RATIO, "number", higher_is_better=False),
        ]

    @classmethod
    def agreement(cls, expected: Outputs, got: Outputs, batch: Batch) -> np.ndarray:
        """Whether they choose the same token at each place of the target."""
        kept = counted_places(batch, MASK, expected["logits"].shape).cpu().numpy()
        ours, theirs = (agreement.array(outputs["logits"])[kept] for outputs in (expected, got))
        return agreement.same(ours, theirs)

    @staticmethod
    @cache
    def _scorers() -> tuple[Callable[[str, str], float], Callable[[str, str], float]]:
        """ROUGE-L and chrF of (text, target), each in 0..1. Raises UserError where their packages are missing."""
        try:
            from rouge_score.rouge_scorer import RougeScorer
            from sacrebleu.metrics import CHRF
        except ImportError as error:
            raise UserError(
                f"task seq2seq: {error.name} is missing, which scores the texts: pip install 'mptrain[seq2seq]'"
            ) from error
        rouge, chrf = RougeScorer(["rougeL"]), CHRF()

        def of_words(text: str, target: str) -> float:
            return float(rouge.score(target, text)["rougeL"].fmeasure)

        def of_characters(text: str, target: str) -> float:
            return float(chrf.sentence_score(text, [target]).score) / 100

        return of_words, of_characters


def _start(processor: Any) -> int:
    """The token that a decoder begins with, which only the model's config says. Raises ModelError."""
    try:
        config = AutoConfig.from_pretrained(processor.name_or_path, local_files_only=True)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"model.path: {processor.name_or_path} has no config.json beside its tokenizer, which names the token that"
            " its decoder begins with (decoder_start_token_id); copy it there."
        ) from error
    start = getattr(config, "decoder_start_token_id", None)
    if start is None:
        raise ModelError(
            f"model.path: the config of {processor.name_or_path} names no decoder_start_token_id, the token that its"
            " decoder begins with; add it to config.json."
        )
    return int(start)


def _end(processor: Any) -> int:
    """Raises ModelError for a tokenizer without an end token."""
    end = processor.eos_token_id if processor.eos_token_id is not None else processor.sep_token_id
    if end is None:
        raise ModelError(
            f"model.path: the tokenizer of {processor.name_or_path} has no end token (eos_token), so a text that the"
            " model writes would have no end; set one."
        )
    return int(end)
