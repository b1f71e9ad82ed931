"""Checkpoints: exact, whole or not used, and never unpickled."""

from __future__ import annotations

import pickle
import random

import numpy as np
import pytest
import torch
from transformers import BertConfig, BertForMaskedLM

from mptrain.core.errors import TrainingError
from mptrain.train import checkpoint


def test_an_optimizer_state_comes_back_exactly(tmp_path):
    weights = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    optimizer = torch.optim.AdamW([{"params": weights[:1], "lr": 0.1 + 0.2}, {"params": weights[1:]}], lr=1e-3)
    for w in weights:
        w.grad = torch.randn_like(w)
    optimizer.step()
    checkpoint.save_state(optimizer.state_dict(), tmp_path / "optimizer")
    fresh = torch.optim.AdamW([{"params": weights[:1]}, {"params": weights[1:]}], lr=1.0)
    fresh.load_state_dict(checkpoint.load_state(tmp_path / "optimizer"))
    for old, new in zip(optimizer.param_groups, fresh.param_groups):
        assert {k: v for k, v in old.items() if k != "params"} == {
            k: tuple(v) if isinstance(v, list) and k == "betas" else v for k, v in new.items() if k != "params"
        }
    for w in weights:
        for name, value in optimizer.state[w].items():
            assert torch.equal(value, fresh.state[w][name])


def test_random_states_come_back_exactly(tmp_path):
    random.gauss(0, 1)
    np.random.standard_normal()
    checkpoint.save_state(checkpoint.rng_state(), tmp_path / "rng")
    expected = (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist())
    checkpoint.set_rng_state(checkpoint.load_state(tmp_path / "rng"))
    got = (random.gauss(0, 1), random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist())
    assert got == expected


def small_model():
    return BertForMaskedLM(
        BertConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50)
    )


def test_tied_weights_are_saved_once_and_load_strictly(tmp_path):
    model, other = small_model(), small_model()
    path = tmp_path / "w.safetensors"
    checkpoint.save_weights(model, path)
    assert len(checkpoint.model_tensors(model)) < len(model.state_dict())
    checkpoint.load_weights(other, path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name]), name
    del_one = {k: v.clone() for k, v in checkpoint.model_tensors(model).items()}
    del_one.popitem()
    from safetensors.torch import save_file

    save_file(del_one, path)
    with pytest.raises(TrainingError, match="does not fit"):
        checkpoint.load_weights(other, path)


def make(folder, step):
    path = folder / f"checkpoint-{step}"
    path.mkdir(parents=True)
    checkpoint.save_state({"x": torch.arange(100) * step}, path / "state")
    checkpoint.seal(path, step=step)
    return path


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    make(tmp_path, 5)
    make(tmp_path, 10)
    newest = make(tmp_path, 100)
    assert checkpoint.latest(tmp_path) == newest
    file = newest / "state.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[:-1])
    assert checkpoint.latest(tmp_path).name == "checkpoint-10"
    assert "checkpoint-100 is not usable" in caplog.text and "bytes" in caplog.text
    file.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    assert "damaged" in checkpoint.fault(newest)
    file.unlink()
    assert "missing" in checkpoint.fault(newest)
    (tmp_path / "checkpoint-10" / checkpoint.MANIFEST).unlink()
    assert checkpoint.latest(tmp_path).name == "checkpoint-5"
    for junk in ("{", "[]", '{"files": 3}', '{"files": {"a": 1}}'):
        (tmp_path / "checkpoint-5" / checkpoint.MANIFEST).write_text(junk)
        assert checkpoint.latest(tmp_path) is None


def test_no_state_with_code_is_written_or_read(tmp_path):
    with pytest.raises(TypeError, match="cannot save a"):
        checkpoint.save_state({"f": object()}, tmp_path / "s")

    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    checkpoint.save_state({"x": torch.ones(2)}, tmp_path / "s")
    for name in ("s.json", "s.safetensors"):
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(pickle.dumps(Evil()))
        with pytest.raises(Exception):
            checkpoint.load_state(tmp_path / "s")
        assert not (tmp_path / "ran").exists()
        (tmp_path / name).write_bytes(whole)
