"""mptrain.Trainer under FSDP2 on 2 and 4 gloo processes: as one process, one decision for all, shards that resume."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
from kit import processes
from kit.training import Poison, Rows, arguments, model, same
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForSequenceClassification, TrainerCallback

from mptrain import Trainer
from mptrain.compress.quantize import quantizers
from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized
from mptrain.precision import memory
from mptrain.precision.fully_sharded import gathered
from mptrain.recipe import Distill, Qat
from mptrain.train.distill import Distiller

NORMS = {"compute": "bf16", "keep_fp32": ["norms"]}
MODES = {"fp32": None, "bf16": "bf16-master", "fp16": "fp16-master", "norms": NORMS}
MICRO = 4  # micro-steps of one optimizer step, over all ranks
SAVES = {"save_strategy": "steps", "save_steps": 2}


class AtBegin(TrainerCallback):
    """Masters as training begins, on resume those of the checkpoint."""

    def on_train_begin(self, args, state, control, model, optimizer, **kwargs):
        half = getattr(optimizer.optimizer, "masters", None)
        self.masters = gathered(model, True) if half is None else {n: m.clone() for n, m in half.read().items()}


def net(seed=1):
    return model(seed, num_hidden_layers=2, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def trainer(folder, precision, ranks, poison=None, callbacks=(), **kwargs):
    m, distiller = net(), None
    if kwargs.pop("taught", False):
        distiller = Distiller(net(seed=2), Distill(weight=0.5))
        m = quantizers.quantize(m, Qat(mode="qat"), [{"input_ids": Rows(128).ids[:16]}]).train()
    callbacks = [*callbacks, *([Poison(m, *poison)] if poison else [])]
    options = dict(max_steps=4, per_device_train_batch_size=4, gradient_accumulation_steps=MICRO // ranks)
    options |= dict(learning_rate=1e-3, weight_decay=0.1, precision=precision, max_grad_norm=0.1)
    if ranks > 1:
        options["ddp_backend"] = "gloo"
    given = arguments(folder, **(options | kwargs))
    return Trainer(m, given, train_dataset=Rows(128), callbacks=callbacks, distiller=distiller)


def run(*args, resume=None, **kwargs):
    t = trainer(*args, **kwargs)
    t.train(resume_from_checkpoint=resume)
    return t


def history(t):
    return {k: [r[k] for r in t.state.log_history if k in r] for k in ("loss", "grad_norm")}


def begin(rank, ranks, port):
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true"}
    os.environ |= processes.FSDP2


def trains_saves_and_resumes(folder, name, ranks):
    precision = MODES[name]
    t = run(f"{folder}/{name}", precision, ranks, **SAVES)
    assert isinstance(t.model, FSDPModule) and isinstance(next(t.model.parameters()), DTensor)
    assert sum(isinstance(m, FSDPModule) for m in t.model.modules()) >= 4, "each block by itself"
    if dist.get_rank() == 0:  # which holds most
        kind = {"fp32": "fp32", "fp16": "fp16-master"}.get(name, "bf16-master")
        predicted = memory.predict_sharded(net(), kind, ranks, ["norms"] if name == "norms" else [])
        assert predicted.masters == sum(p.to_local().nbytes for p in t.model.parameters())
        moments = [v for state in t.optimizer.state.values() for v in state.values() if isinstance(v, DTensor)]
        assert predicted.moments == sum(v.to_local().nbytes for v in moments)
    masters = gathered(t.model, True)
    t.save_model(f"{folder}/{name}/whole")
    again = run(f"{folder}/{name}", precision, ranks, resume=f"{folder}/{name}/checkpoint-2")
    assert same(gathered(again.model, True), masters)
    plain = t.release()
    assert type(plain) is type(net()) and same(plain.state_dict(), masters)
    assert plain(Rows(128)[0]["input_ids"][None]).logits.shape == (1, 2)
    saved = AutoModelForSequenceClassification.from_pretrained(f"{folder}/{name}/whole")
    assert saved.dtype == torch.float32 and same(saved.state_dict(), masters)
    torch.save(masters, f"{folder}/{name}.pt")
    return history(t)


def one_rank_makes_all_skip(folder, rank, ranks):
    t = run(f"{folder}/nan", "bf16-master", ranks, poison=(1, 2) if rank == ranks - 1 else None)
    assert t.master_weights.skipped_steps == 1 and t.lr_scheduler.last_epoch == 3
    assert all(p.isfinite().all() for p in gathered(t.model, True).values())


def worker(rank, ranks, port, folder, modes, others):
    """others: checkpoints that other numbers of ranks wrote, and their masters."""
    begin(rank, ranks, port)
    out = {name: trains_saves_and_resumes(folder, name, ranks) for name in modes}
    t = run(f"{folder}/taught", "bf16-master", ranks, taught=True)
    assert isinstance(next(t.distiller.teacher.parameters()), DTensor)
    out["taught"] = history(t)
    masters = gathered(t.model, True)
    assert same(t.release().state_dict(), masters) and is_quantized(t.model)
    plain, _, _ = quantizers.detach(t.model)
    assert not any(isinstance(m, FSDPModule) for m in plain.modules())
    one_rank_makes_all_skip(folder, rank, ranks)
    for path, masters in others:
        goes_on_from(path, masters, folder, ranks)
    with pytest.raises(UserError, match="master: split keeps half"):
        trainer(folder, "bf16-split", ranks)
    torch.save(out, f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def goes_on_from(path, masters, folder, ranks):
    at_begin = AtBegin()
    t = run(folder, NORMS, ranks, resume=path, callbacks=[at_begin], max_steps=5)
    assert same(at_begin.masters, torch.load(masters, weights_only=True))
    assert t.state.global_step == 5 and history(t)["grad_norm"][-1] < 1


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def alone(folder, modes):
    """One process, with accumulation."""
    found = {}
    for name in modes:
        t = run(folder / name, MODES[name], 1, **SAVES)
        found[name] = history(t)
        torch.save(dict(t.release().state_dict()), folder / f"{name}.pt")
    return found | {"taught": history(run(folder, "bf16-master", 1, taught=True))}


def written(folder):
    return str(folder / "norms" / "checkpoint-4"), str(folder / "norms.pt")


def compare(folder, ranks, expected):
    for rank in range(ranks):
        found = torch.load(folder / f"{rank}.pt", weights_only=True)
        for name, values in found.items():
            assert values["loss"] == pytest.approx(expected[name]["loss"], rel=1e-5), name
            assert values["grad_norm"] == pytest.approx(expected[name]["grad_norm"], rel=1e-3), name


@pytest.mark.long
def test_two_ranks_train_as_one_with_accumulation(tmp_path):
    """And each goes on from what the other wrote."""
    one, two = tmp_path / "one", tmp_path / "two"
    two.mkdir()
    one.mkdir()
    expected = alone(one, ["norms"])
    processes.ranks(worker, (2, free_port(), str(two), ["norms"], [written(one)]), 2)
    compare(two, 2, expected)
    goes_on_from(*written(two), two, 1)


@pytest.mark.long
def test_four_ranks_go_on_from_the_shards_of_two(tmp_path):
    two, four = tmp_path / "two", tmp_path / "four"
    expected = alone(tmp_path, MODES)
    for folder, ranks, others in ((two, 2, []), (four, 4, [written(two)]), (two, 2, [written(four)])):
        folder.mkdir(exist_ok=True)
        processes.ranks(worker, (ranks, free_port(), str(folder), list(MODES), others), ranks)
        compare(folder, ranks, expected)
