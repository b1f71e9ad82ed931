"""mptrain.Trainer with `precision` on 2 and 4 gloo processes: one with accumulation, one decision for all."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from kit import processes
from kit.training import Poison, Rows, arguments, masters, model, same
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from mptrain import Trainer
from mptrain.core.errors import TrainingError

MODES = ["fp16-master", "bf16-master", "bf16-split"]
MICRO = 4  # micro-steps of one optimizer step, over all ranks


class AtBegin(TrainerCallback):
    """Masters as training begins, on resume those of the checkpoint."""

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        self.masters = {n: m.clone() for n, m in optimizer.optimizer.masters.read().items()}


def run(folder, precision, ranks, resume=None, poison=None, callbacks=(), evaluate_first=False, seed=1, **kwargs):
    m = model(seed, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    callbacks = [*callbacks, *([Poison(m, *poison)] if poison else [])]
    options = dict(max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=MICRO // ranks, optim="sgd")
    options |= dict(learning_rate=0.1, precision=precision, max_grad_norm=0.5)
    if ranks > 1:
        options["ddp_backend"] = "gloo"
    t = Trainer(m, arguments(folder, **(options | kwargs)), train_dataset=Rows(128), callbacks=callbacks)
    if evaluate_first:
        t.evaluate(Rows(128))
    t.train(resume_from_checkpoint=resume)
    assert isinstance(t.model_wrapped, DistributedDataParallel) is (ranks > 1)
    return t


def equal_on_all_ranks(t):
    own = masters(t) if t.master_weights else {n: p.detach() for n, p in t.model.named_parameters()}
    mine = torch.cat([m.flatten() for m in own.values()])
    first = mine.clone()
    dist.broadcast(first, 0)
    return torch.equal(mine, first)


def worker(rank, ranks, port, folder):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    out = {}
    for precision in MODES:
        t = run(f"{folder}/{precision}", precision, ranks, save_strategy="steps", save_steps=2)
        assert equal_on_all_ranks(t)
        out[precision] = masters(t)
        again = run(f"{folder}/{precision}", precision, ranks, resume=f"{folder}/{precision}/checkpoint-2")
        assert same(masters(again), masters(t))
    # in the second epoch, whose batches are others
    late = {"max_steps": 12, "save_strategy": "steps", "save_steps": 10}
    t = run(f"{folder}/late", "bf16-master", ranks, **late)
    again = run(f"{folder}/late", "bf16-master", ranks, resume=f"{folder}/late/checkpoint-10", **late)
    assert same(masters(again), masters(t))
    # one process wrote this; its masters arrive bit for bit
    begin = AtBegin()
    checkpoint = f"{folder}/../one/checkpoint-4"
    t = run(folder, "bf16-split", ranks, resume=checkpoint, callbacks=[begin], max_steps=5)
    assert equal_on_all_ranks(t)
    out["resumed"] = begin.masters
    # an evaluation before training, after which transformers would train the plain model; other weights a rank
    for precision in ("fp16-master", None):
        t = run(folder, precision, ranks, evaluate_first=True, seed=rank)
        assert equal_on_all_ranks(t)
    # NaN on the last rank alone: both skip, both go on
    t = run(folder, "bf16-master", ranks, poison=(1, 2) if rank == ranks - 1 else None)
    assert t.master_weights.skipped_steps == 1 and t.lr_scheduler.last_epoch == 3
    assert equal_on_all_ranks(t) and all(m.isfinite().all() for m in masters(t).values())
    # and for good: all ranks end together, each with its own diagnosis
    scale = {"init": 1, "floor": 1, "ceiling": 1, "interval": None, "patience": 2}
    with pytest.raises(TrainingError, match=f"2 optimizer steps in a row were skipped on rank {rank}"):
        run(folder, {"compute": "bf16", "loss_scale": scale}, ranks, poison=(1, 9) if rank == 0 else None)
    torch.save(out, f"{folder}/masters-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    found = {p: masters(run(folder / p, p, 1)) for p in MODES}
    found["resumed"] = masters(run(folder / "one", "bf16-split", 1, save_strategy="steps", save_steps=4))
    return folder, found


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.long)])
def test_ranks_train_as_one_with_accumulation(one, ranks):
    folder, expected = one
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / str(ranks)).mkdir()
    processes.ranks(worker, (ranks, port, str(folder / str(ranks))), ranks)
    for rank in range(ranks):
        found = torch.load(folder / str(ranks) / f"masters-{rank}.pt", weights_only=True)
        assert same(found.pop("resumed"), expected["resumed"])
        for precision, values in found.items():
            for name, value in values.items():
                torch.testing.assert_close(value, expected[precision][name], rtol=1e-5, atol=1e-6)
