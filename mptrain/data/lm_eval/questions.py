"""Multiple-choice accuracy of a causal language model, as lm-eval computes it.

For context c and choice a_i, both text, with the task's delimiter d (spaces at the end of c move to the choice):

    ll_i     = Σ log p(token | tokens before it) over the tokens of d + a_i after those of c
    acc      = argmax_i ll_i is a right choice
    acc_norm = argmax_i ll_i / characters of a_i is a right choice     (the delimiter does not count)

The tokens of d + a_i are those of c + d + a_i from the length of c's own on. An empty c is the tokenizer's bos (or
eos) token. What is longer than the model reads loses its first tokens. Few-shot examples are drawn as lm-eval draws
them with its default seed.

One difference: a token that a tokenizer appends at the end of a text (as BERT's does, and no causal model's should) is
left off here; lm-eval would score it. Contexts that choices share run once.

Source: Gao et al., "The Language Model Evaluation Harness", version 0.4.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedConfig

from mptrain.core.errors import DataError, MptrainError
from mptrain.core.progress import progress as said
from mptrain.data.lm_eval.rows import on_hub, read_rows
from mptrain.data.lm_eval.task_file import Document, TaskFile, read_task
from mptrain.data.tasks.base import BATCH_BYTES, Batch, Outputs
from mptrain.data.tasks.metrics import MEAN, Score
from mptrain.data.tasks.text import pad, tokenize

log = logging.getLogger(__name__)

SEED = 1234  # of lm-eval's few-shot sampler
_TOKENS = 4096  # the most of a batch; fewer where their logits in float32 would be above BATCH_BYTES


@dataclass(frozen=True)
class Question:
    context: str
    choices: list[str]
    gold: list[int]


@dataclass(frozen=True)
class Request:
    """inputs: tokens the model reads; targets: those it should predict at its last len(targets) positions."""

    inputs: tuple[int, ...]
    targets: tuple[int, ...]


class MultipleChoice:
    """The questions of one task file, ready for models that share a tokenizer.

    Attributes:
        name: the file's `task`.
        hash: sha256 of all tokens, right choices and metrics.
        facts: JSON facts for the report: file, split, questions, few-shot examples, the accuracy of guessing, and
            how many requests lost tokens at the front.
    """

    def __init__(self, file: str, tokenizer: Any, max_length: int) -> None:
        """max_length: tokens the model reads. Raises DataError that names the key of the file."""
        task = self.task = read_task(file)
        self.name = task.task
        self._tokenizer = tokenizer
        wanted = [task.scored_split, *([task.shots_split] if task.num_fewshot else [])]
        rows = read_rows(task, wanted)
        self.questions = _questions(task, rows)
        requests = [[self._request(q.context, choice) for choice in q.choices] for q in self.questions]
        cut = sum(len(r.inputs) > max_length for rs in requests for r in rs)
        for place, each in enumerate(requests, 1):
            if max(len(r.targets) for r in each) > max_length:
                raise DataError(f"{file}: a choice of row {place} is longer than the {max_length} tokens of the model.")
        self.requests = [[Request(r.inputs[-max_length:], r.targets) for r in each] for each in requests]
        content = [[[r.inputs, r.targets] for r in each] for each in self.requests]
        golds, lengths = [q.gold for q in self.questions], [[len(c) for c in q.choices] for q in self.questions]
        self.hash = hashlib.sha256(json.dumps([content, golds, lengths, task.metrics]).encode()).hexdigest()
        self.facts = {
            "file": file,
            "split": task.scored_split,
            "questions": len(self.questions),
            "num_fewshot": task.num_fewshot,
            "guessing": float(np.mean([len(set(q.gold)) / len(q.choices) for q in self.questions])),
            "truncated": cut,
        }
        if cut:
            log.warning("%s: %d choices with their context exceed %d tokens; the front is cut", file, cut, max_length)

    @property
    def longest(self) -> int:
        """Tokens of the longest input."""
        return max(len(r.inputs) for each in self.requests for r in each)

    def log_likelihoods(self, forward: Callable[[Batch], Outputs], progress: str | None = None) -> list[np.ndarray]:
        """float64 [choices] for every question: the log-probability of the choice's tokens.

        forward: a function from input_ids and attention_mask [b, s] to named outputs, of which `logits` [b, s, v].
        Raises MptrainError when they are not finite.
        """
        waiting: dict[tuple[int, ...], list[tuple[int, int]]] = {}
        for question, each in enumerate(self.requests):
            for choice, request in enumerate(each):
                waiting.setdefault(request.inputs, []).append((question, choice))
        found = [np.zeros(len(each)) for each in self.requests]
        order = sorted(waiting, key=lambda tokens: (-len(tokens), tokens))
        tokens_at_once = min(_TOKENS, BATCH_BYTES // (4 * len(self._tokenizer)))
        with torch.no_grad(), said(progress or "", len(order), shown=progress is not None) as bar:
            start = 0
            while start < len(order):
                rows = order[start : start + max(1, tokens_at_once // len(order[start]))]
                examples = [{"input_ids": np.array(r), "attention_mask": np.ones(len(r), np.int64)} for r in rows]
                logits = torch.as_tensor(forward(pad(examples, self._tokenizer, side="right"))["logits"])
                for row, tokens in zip(logits, rows, strict=True):
                    for question, choice in waiting[tokens]:
                        targets = self.requests[question][choice].targets
                        found[question][choice] = _sum_of_logs(row[: len(tokens)], targets)
                start += len(rows)
                bar.update(len(rows))
        if not all(np.isfinite(each).all() for each in found):
            raise MptrainError(f"{self.name}: the model's logits are not finite, so it cannot be scored.")
        return found

    def evaluate(self, forward: Callable[[Batch], Outputs], progress: str | None = None) -> list[Score]:
        """The task's metrics, each with 0 or 1 for every question, in the order of the rows."""
        likelihoods = self.log_likelihoods(forward, progress)
        scores = []
        for metric in self.task.metrics:
            right = []
            for logs, question in zip(likelihoods, self.questions, strict=True):
                worth = logs / [len(c) for c in question.choices] if metric == "acc_norm" else logs
                right.append([float(int(np.argmax(worth)) in question.gold)])
            scores.append(Score(metric, np.array(right), MEAN))
        return scores

    def _request(self, context: str, choice: str) -> Request:
        continuation = self.task.target_delimiter + choice
        kept = context.rstrip()
        continuation, context = context[len(kept) :] + continuation, kept
        start = self._tokenizer.bos_token_id
        start = self._tokenizer.eos_token_id if start is None else start
        before = self._encode(context, start) if context else []
        if before:
            targets = self._encode(context + continuation, start)[len(before) :]
        else:
            if start is None:
                self.task.refuse(
                    "doc_to_text", "gives an empty text, and the tokenizer has no bos or eos to stand for it"
                )
            targets = tokenize(self._tokenizer, continuation, add_special_tokens=False)["input_ids"]
            before = [start]
            if targets[:1] == before:
                targets = targets[1:]
        if not targets:
            self.task.refuse("doc_to_choice", f"the choice {choice!r} after {context[-40:]!r} has no token of its own")
        return Request((*before, *targets[:-1]), tuple(targets))

    def _encode(self, text: str, start: int | None) -> list[int]:
        """Tokens with those that the tokenizer puts in front, once, and without those it appends."""
        given = start is not None and text.startswith(self._tokenizer.decode([start]))
        encoding = tokenize(self._tokenizer, text, add_special_tokens=not given, return_special_tokens_mask=True)
        ids, special = list(encoding["input_ids"]), encoding["special_tokens_mask"]
        appended = next((i for i, mark in enumerate(reversed(special)) if not mark), len(ids))
        return ids[: len(ids) - appended]


def context_length(config: PreTrainedConfig, tokenizer: Any) -> int:
    """Tokens that a language model reads at once, by its config and its tokenizer; 2,048 where neither says."""
    text = config.get_text_config()
    sizes = (getattr(text, name, None) for name in ("n_positions", "max_position_embeddings", "n_ctx"))
    size = next((s for s in sizes if s), None)
    return min(size or 2048, tokenizer.model_max_length)


def read_tasks(files: Sequence[str], tokenizer: Any, max_length: int, *, offline: bool = False) -> list[MultipleChoice]:
    """The tasks of a recipe; offline, without those whose rows are on the hub. Raises DataError, also when two have
    one name."""
    tasks: dict[str, MultipleChoice] = {}
    for file in files:
        if offline and on_hub(read_task(file)):
            continue
        task = MultipleChoice(file, tokenizer, max_length)
        if task.name in tasks:
            raise DataError(
                f"evaluate.multiple_choice: {file} and {tasks[task.name].facts['file']} are both named"
                f" {task.name!r}; give one of them another `task`."
            )
        tasks[task.name] = task
    return list(tasks.values())


def _questions(task: TaskFile, rows: dict[str, list[Document]]) -> list[Question]:
    shots = _Shots(task, rows)
    found = []
    for place, row in enumerate(rows[task.scored_split], 1):
        try:
            choices = task.choices(row)
            context = task.preface(row) + shots(row) + task.text(row)
            found.append(Question(context, choices, task.gold(row, choices)))
        except DataError as error:
            raise DataError(f"{error} (row {place} of split {task.scored_split!r})") from None
    return found


class _Shots:
    """The few-shot examples before a question, called once for every row in order, for the generator goes on."""

    def __init__(self, task: TaskFile, rows: dict[str, list[Document]]) -> None:
        self.task = task
        self.pool = rows[task.shots_split] if task.num_fewshot else []
        # lm-eval compares the two keys of the file, so neither given counts as equal.
        self.without_own = task.fewshot_split == task.test_split
        if task.num_fewshot and task.shots_split == task.scored_split and not self.without_own:
            task.refuse(
                "fewshot_split",
                f"{task.shots_split!r} is also scored, so that a question could be its own example; give another split",
            )
        if task.num_fewshot and task.num_fewshot + self.without_own > len(self.pool):
            task.refuse("num_fewshot", f"{task.num_fewshot} is too many for the {len(self.pool)} rows of the split")
        self.random = random.Random(SEED)

    def __call__(self, row: Document) -> str:
        return "".join(self._shown(shot) for shot in self._draw(row)) if self.task.num_fewshot else ""

    def _draw(self, row: Document) -> list[Document]:
        count = self.task.num_fewshot
        others = [r for r in self.pool if r != row] if self.without_own else self.pool
        if self.task.sampler == "first_n":
            return others[:count]
        if not self.without_own:
            return self.random.sample(self.pool, count)
        drawn = [r for r in self.random.sample(self.pool, count + 1) if r != row][:count]
        return drawn if len(drawn) == count else self.random.sample(others, count)  # the row is there more than once

    def _shown(self, row: Document) -> str:
        choices = self.task.choices(row)
        gold = self.task.gold(row, choices)
        if len(gold) != 1:
            self.task.refuse("doc_to_target", f"gives {len(gold)} right choices, a few-shot example shows one")
        return self.task.text(row) + self.task.target_delimiter + choices[gold[0]] + self.task.fewshot_delimiter


def _sum_of_logs(logits: torch.Tensor, targets: Sequence[int]) -> float:
    """logits [s, v] whose last rows predict the targets."""
    logs = logits[-len(targets) :].float().log_softmax(-1)
    return float(logs.gather(1, torch.tensor(targets, device=logs.device)[:, None]).double().sum())
