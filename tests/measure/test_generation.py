"""What an export with a cache writes: like torch, at which times, and whether its cache changes what it says."""

from __future__ import annotations

import sys
from contextlib import closing

import numpy as np
import pytest
from kit.tiny_models import inputs, tiny

from mptrain.export.openvino.runner import CachedIr
from mptrain.export.openvino.write import write
from mptrain.measure import generation, memory
from mptrain.recipe import Generation

PROMPT = np.array([[5, 6, 7]])


class Counting:
    """Says the token after the last one, of 10; `wrong` from so many places on. A call takes its tokens in seconds."""

    def __init__(self, clock, speed=1.0, wrong=99):
        self.clock, self.speed, self.wrong = clock, speed, wrong
        self.calls = []

    def reset(self):
        self.places = 0

    def step(self, batch):
        ids = batch["input_ids"]
        assert batch["attention_mask"].shape[1] == self.places + ids.shape[1]
        self.calls.append(ids.shape)
        self.places += ids.shape[1]
        self.clock["now"] += self.speed * ids.shape[1]
        said = (ids + (1 if self.places <= self.wrong else 2)) % 10
        return {"logits": np.eye(10, dtype=np.float32)[said] * 9}


@pytest.fixture
def clock(monkeypatch):
    now = {"now": 0.0}
    monkeypatch.setattr(generation.time, "perf_counter", lambda: now["now"])
    return now


def test_the_text_is_greedy_and_goes_on_with_what_was_said(clock):
    decoder = Counting(clock)
    assert generation.greedy(decoder, PROMPT, 5) == [8, 9, 0, 1, 2]
    assert decoder.calls == [(1, 3)] + [(1, 1)] * 4
    other = generation.greedy(Counting(clock, wrong=5), PROMPT, 5)
    assert generation.same([8, 9, 0, 1, 2], other) == 3 and generation.same(other, other) == 5


def test_first_and_further_tokens_are_timed_in_turns(clock):
    decoders = {"a": Counting(clock), "b": Counting(clock, 0.5)}
    how = Generation(prompt=3, tokens=4)
    found = generation.timed(["a", "b"], lambda variant, threads: decoders[variant], PROMPT, how)
    assert found["a"]["first_token_ms"] == {"median": 3000, "min": 3000, "runs": generation.ROUNDS}
    assert found["a"]["token_ms"] == {"median": 1000, "min": 1000, "runs": 3 * generation.ROUNDS}
    assert found["b"]["token_ms"]["median"] == 500 and found["b"]["tokens_per_second"] == 2


def test_a_cache_that_changes_what_is_said_shows_in_the_perplexity(clock):
    texts = (np.arange(24).reshape(3, 8)) % 10
    right = generation.cached(Counting(clock), texts)
    assert right["tokens"] == 21 and right["relative"] < 1e-12
    assert right["whole"] == pytest.approx(1 + 9 * np.exp(-9))

    class Forgetful(Counting):
        def step(self, batch):
            found = super().step(batch)
            return found if batch["input_ids"].shape[1] > 1 else {"logits": 0 * found["logits"]}

    assert generation.cached(Forgetful(clock), texts)["token_by_token"] == pytest.approx(10)


def test_an_ir_and_torch_are_decoders_and_write_the_same(tmp_path):
    model, batch = tiny("llama"), inputs("llama")
    xml = write(model, batch, tmp_path, precision="fp32", cache=20).xml
    ids = batch["input_ids"][:2, :8].numpy()
    torch_ = generation.TorchDecoder(model)
    with closing(CachedIr(xml, 20, 1)) as runner:
        assert isinstance(runner, generation.Decoder)
        ours, theirs = (generation.greedy(decoder, ids[:1], 10) for decoder in (runner, torch_))
        assert ours == theirs
        for decoder in (runner, torch_):
            assert generation.cached(decoder, ids)["relative"] < 1e-5


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells")
def test_memory_that_is_added_is_measured():
    with memory.added() as found:
        kept = np.ones(8 * 2**20)
        del kept
    assert 60 * 2**20 < found.bytes < 100 * 2**20
    with memory.added() as nothing:
        pass
    assert nothing.bytes < 16 * 2**20
