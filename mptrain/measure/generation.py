"""How a language model with a key-value cache writes: the time to its first token, and of each further one.

    first token    one call with all tokens of the prompt, on an empty cache
    per token      calls of one token each, the one that the call before made most probable
    cached         perplexity of texts that go in token by token, against that of the same texts gone in whole: what
                   the cache changes
    same           tokens that the exported model writes as the torch model does, up to the first other one

Variants take turns, a whole continuation each, as in latency.py. Sampling is no part of it: a greedy continuation is
the same in every round, so only the time differs.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.core.host import thread_count
from mptrain.core.progress import progress
from mptrain.core.signature import Outputs
from mptrain.recipe import Generation

ROUNDS = 3


@runtime_checkable
class Decoder(Protocol):
    """A model that keeps what it has read."""

    def reset(self) -> None:
        """Forget it."""
        ...

    def step(self, batch: Mapping[str, Tensor | np.ndarray]) -> Outputs:
        """input_ids [b, n] int64, the next tokens of b texts, to {"logits": [b, n, vocabulary]}; attention_mask
        [b, places so far + n]."""
        ...


class TorchDecoder:
    """A causal LM of transformers as a Decoder."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.reset()

    def reset(self) -> None:
        self._cache: Any = None

    @torch.no_grad()
    def step(self, batch: Mapping[str, Tensor | np.ndarray]) -> Outputs:
        given = {name: torch.as_tensor(value) for name, value in batch.items()}
        outputs = self.model(**given, past_key_values=self._cache, use_cache=True)
        self._cache = outputs.past_key_values
        return {"logits": outputs.logits.numpy()}


def timed(
    ids: Sequence[str], decoder: Callable[[str, int], Decoder], prompt: np.ndarray, how: Generation
) -> dict[str, dict[str, Any]]:
    """By variant {"first_token_ms", "token_ms" ({"median", "min", "runs"}), "tokens_per_second"}.

    decoder: of a variant for a number of threads. prompt: token ids [1, n] int64.
    """
    count = thread_count(how.threads)
    decoders = {variant: decoder(variant, count) for variant in ids}
    first: dict[str, list[float]] = {variant: [] for variant in ids}
    later: dict[str, list[float]] = {variant: [] for variant in ids}
    collecting = gc.isenabled()
    gc.disable()
    try:
        with progress("generation", (1 + ROUNDS) * len(ids), unit="text") as bar:
            for number in range(1 + ROUNDS):  # the first allocates and picks kernels, and does not count
                for variant in [*ids[number % len(ids) :], *ids[: number % len(ids)]]:
                    times: list[float] = []
                    greedy(decoders[variant], prompt, how.tokens, times)
                    if number:
                        first[variant].append(times[0])
                        later[variant] += times[1:]
                    bar.update()
    finally:
        if collecting:
            gc.enable()
    return {
        variant: {
            "first_token_ms": _summed(first[variant]),
            "token_ms": _summed(later[variant]),
            "tokens_per_second": 1 / statistics.median(later[variant]),
        }
        for variant in ids
    }


def greedy(decoder: Decoder, prompt: np.ndarray, tokens: int, times: list[float] | None = None) -> list[int]:
    """The ids of so many tokens after the prompt [1, n]. times: of each call, in seconds, go there."""
    decoder.reset()
    found: list[int] = []
    given, places = prompt, prompt.shape[1]
    for _ in range(tokens):
        begun = time.perf_counter()
        logits = decoder.step({"input_ids": given, "attention_mask": np.ones((1, places), dtype=np.int64)})["logits"]
        if times is not None:
            times.append(time.perf_counter() - begun)
        found.append(int(np.asarray(logits)[0, -1].argmax()))
        given, places = np.array([[found[-1]]], dtype=np.int64), places + 1
    return found


def same(ours: Sequence[int], theirs: Sequence[int]) -> int:
    """Tokens up to the first that differs."""
    return next((place for place, pair in enumerate(zip(ours, theirs)) if pair[0] != pair[1]), len(ours))


def cached(decoder: Decoder, texts: np.ndarray) -> dict[str, Any]:
    """{"whole", "token_by_token" (perplexities), "relative" (their difference over `whole`), "tokens" (predicted)}.

    texts: token ids [b, n] int64, n at least 2, without padding.
    """
    decoder.reset()
    mask = np.ones_like(texts)
    whole = _nll(np.asarray(decoder.step({"input_ids": texts, "attention_mask": mask})["logits"])[:, :-1], texts[:, 1:])
    decoder.reset()
    steps = 0.0
    for place in range(texts.shape[1] - 1):
        given = {"input_ids": texts[:, place : place + 1], "attention_mask": mask[:, : place + 1]}
        steps += _nll(np.asarray(decoder.step(given)["logits"]), texts[:, place + 1 : place + 2])
    count = texts[:, 1:].size
    perplexity, other = float(np.exp(whole / count)), float(np.exp(steps / count))
    relative = abs(other - perplexity) / perplexity
    return {"whole": perplexity, "token_by_token": other, "relative": relative, "tokens": count}


def _nll(logits: np.ndarray, targets: np.ndarray) -> float:
    """Summed over all places; logits [b, n, vocabulary], targets [b, n]."""
    total = 0.0
    for row, wanted in zip(logits.reshape(-1, logits.shape[-1]), targets.reshape(-1)):
        shifted = row.astype(np.float64) - row.max()
        total += float(np.log(np.exp(shifted).sum()) - shifted[wanted])
    return total


def _summed(seconds: Sequence[float]) -> dict[str, float | int]:
    milliseconds = [1e3 * s for s in seconds]
    return {"median": statistics.median(milliseconds), "min": min(milliseconds), "runs": len(milliseconds)}
