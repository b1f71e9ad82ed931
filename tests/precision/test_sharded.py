"""FSDP2 on gloo, 2 and 4 processes: fp32 shards are the masters, all ranks skip together, as one process trains."""

import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from kit import processes
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from mptrain.core.errors import ModelError, TrainingError, UserError
from mptrain.precision import LossScale, MasterWeights, ShardedMasters
from mptrain.precision.policy import DTYPES

MICRO = 4


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 21), nn.LayerNorm(21), nn.GELU(), nn.Linear(21, 3))


def data(i, rows=8):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(rows, 6, generator=generator), torch.randint(0, 3, (rows,), generator=generator)


def shard(dtype, mesh=None, optimizer=torch.optim.AdamW, **options):
    model = net()
    policy = MixedPrecisionPolicy(param_dtype=DTYPES[dtype], reduce_dtype=torch.float32)
    mesh = mesh or dist.init_device_mesh("cpu", (dist.get_world_size(),))
    for layer in (model[0], model[3]):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return model, ShardedMasters(model, optimizer(model.parameters(), lr=1e-2), dtype, **options)


def loss_of(model, i):
    x, y = data(i)
    return nn.functional.cross_entropy(model(x).float(), y)


def full(model):
    return {n: p.detach().full_tensor().clone() for n, p in model.named_parameters()}


def train(model, mw, rank, ranks, steps=3):
    for step in range(steps):
        own = range(MICRO * step + rank, MICRO * (step + 1), ranks)
        for j in own:
            if hasattr(model, "set_requires_gradient_sync"):
                model.set_requires_gradient_sync(j == own[-1])
            mw.backward(loss_of(model, j) / len(own))
        assert mw.step()


def as_one_process_with_masters(rank, ranks):
    out = {}
    for dtype in DTYPES:
        model, mw = shard(dtype, max_grad_norm=0.3)
        train(model, mw, rank, ranks)
        out[dtype] = {"norm": torch.tensor(mw.grad_norm), **full(model)}
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    return out


def one_rank_makes_all_skip(rank, ranks):
    for dtype in DTYPES:
        model, mw = shard(dtype)
        mw.backward(loss_of(model, rank))
        assert mw.step()
        before = full(model)
        x = torch.full((2, 6), torch.nan) if rank == ranks - 1 else torch.ones(2, 6)
        mw.backward(model(x).float().sum())
        assert mw.step() is False and mw.skipped_steps == 1
        assert all(torch.equal(p, before[n]) for n, p in full(model).items())
        mw.backward(loss_of(model, rank))
        assert mw.step()


def overflows_from_2_to_the_24(rank, ranks):
    model, mw = shard("fp16", loss_scale=LossScale(init=2.0**24))
    skipped = 0
    while True:
        mw.backward(loss_of(model, rank))
        if mw.step():
            break
        skipped += 1
    assert 3 < skipped < 20 and mw.loss_scale == 2.0 ** (24 - skipped)
    again = shard("fp16")[1]
    again.load_state_dict(copy.deepcopy(mw.state_dict()))
    assert again.logs()["precision/skipped_steps"] == skipped and again.loss_scale == mw.loss_scale


def giving_up_happens_on_all_ranks_at_once(rank, ranks):
    model, mw = shard("bf16", loss_scale=LossScale.static(1.0, patience=2))
    x = torch.full((2, 6), torch.nan) if rank == 1 else torch.ones(2, 6)
    mw.backward(model(x).float().sum())
    assert mw.step() is False
    mw.backward(model(x).float().sum())
    with pytest.raises(TrainingError, match=f"2 optimizer steps in a row were skipped on rank {rank}"):
        mw.step()


def replicas_count_once(rank, ranks):
    """Hybrid sharding: every shard is there twice, its norm once."""
    model, mw = shard("bf16", dist.init_device_mesh("cpu", (2, ranks // 2), mesh_dim_names=("replicate", "shard")))
    mw.backward(loss_of(model, 0))
    norm = nn.utils.get_total_norm([p.grad.full_tensor() for p in model.parameters()])
    assert mw.step()
    assert mw.grad_norm == pytest.approx(float(norm), rel=1e-5)


def half_shards_are_refused(rank, ranks):
    model = net().bfloat16()
    fully_shard(model, mesh=dist.init_device_mesh("cpu", (ranks,)))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ModelError, match=r"0\.weight is sharded in torch\.bfloat16; masters are fp32 shards"):
        ShardedMasters(model, optimizer)
    plain = net()
    whole = torch.optim.AdamW(plain.parameters())
    with pytest.raises(ModelError, match=r"0\.weight is not sharded"):
        ShardedMasters(plain, whole)
    with pytest.raises(ModelError, match="use DDP, or ShardedMasters"):
        MasterWeights(model, optimizer)


def gradients_without_the_loss_scale_are_refused(rank, ranks):
    model, mw = shard("fp16")
    loss_of(model, rank).backward()
    with pytest.raises(UserError, match=r"not multiplied by the loss scale \(65536\)"):
        mw.step()
    mw.zero_grad()
    mw.backward(loss_of(model, rank))
    assert mw.step()


CHECKS = [
    gradients_without_the_loss_scale_are_refused,
    one_rank_makes_all_skip,
    overflows_from_2_to_the_24,
    giving_up_happens_on_all_ranks_at_once,
    half_shards_are_refused,
]


def worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=200)
    )
    for check in CHECKS + ([replicas_count_once] if ranks == 4 else []):
        check(rank, ranks)
        dist.barrier()
    torch.save(as_one_process_with_masters(rank, ranks), f"{folder}/masters-{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(ranks, tmp_path):
    """All CHECKS pass on every rank, and what was trained equals one process with MasterWeights."""
    expected = {}
    for dtype in DTYPES:
        model = net()
        mw = MasterWeights(model, torch.optim.AdamW(model.parameters(), lr=1e-2), dtype, max_grad_norm=0.3)
        train(model, mw, 0, 1)
        expected[dtype] = {"norm": torch.tensor(mw.grad_norm), **mw.masters.read()}
    processes.ranks(worker, (ranks, str(tmp_path)), ranks)
    for rank in range(ranks):
        found = torch.load(tmp_path / f"masters-{rank}.pt", weights_only=True)
        for dtype, values in found.items():
            for name, value in values.items():
                # gradients of one dtype, summed in another order
                torch.testing.assert_close(value, expected[dtype][name], rtol=2e-3, atol=2e-4)
