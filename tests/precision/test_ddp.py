"""DDP over gloo with 2 and 4 processes: sums in fp32, one decision for all ranks, no hang."""

import contextlib
import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from kit import processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mptrain.core.errors import TrainingError, UserError
from mptrain.precision import LossScale, MasterWeights, moments8

CODED = "split, moments of 8 bits"
MODES = [("bf16", "fp32"), ("fp16", "fp32"), ("bf16", "split"), ("bf16", CODED)]
MICRO = 4  # micro-steps of one optimizer step, over all ranks
STEPS = 5


class Net(nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.body = nn.Sequential(nn.Linear(6, 20), nn.LayerNorm(20), nn.GELU(), nn.Linear(20, 3))
        self.unused = nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)


def loss_of(model, i):
    generator = torch.Generator().manual_seed(i)
    x, y = torch.randn(8, 6, generator=generator), torch.randint(0, 3, (8,), generator=generator)
    return nn.functional.cross_entropy(model(x), y)


def build(dtype, master, wrap=True, attach=True, bucket_view=False, seed=0, **options):
    model = Net(seed)
    if master == CODED:
        master, options["moments"] = "split", "int8"
    mw = MasterWeights(model, torch.optim.AdamW(model.parameters(), lr=1e-2), dtype, master, **options)
    if not wrap:
        return model, mw
    model.to(torch.device("cpu", 0))  # copies; Accelerate does it before it wraps
    ddp = DistributedDataParallel(model, find_unused_parameters=True, gradient_as_bucket_view=bucket_view)
    if attach:
        mw.attach(ddp)
    return ddp, mw


def masters(mw):
    return {n: m.clone() for n, m in mw.masters.read().items()}


def same(a, b):
    return all(torch.equal(a[n], b[n]) for n in a)


def train(model, mw, micro_steps, rank, ranks, steps=range(STEPS)):
    """Optimizer steps of MICRO micro-batches, dealt out to the ranks; the mean over all is the step's loss."""
    for i in steps:
        own = range(MICRO * i + rank, MICRO * (i + 1), ranks)
        assert len(own) == micro_steps
        for j in own:
            last = j == own[-1] or ranks == 1
            with contextlib.nullcontext() if last else model.no_sync():
                mw.backward(loss_of(model, j) / micro_steps)
        assert mw.step()


def equal_to_one_rank(rank, ranks):
    out = {}
    for dtype, master in MODES:
        for keep in ((), ("norms",)):
            ddp, mw = build(dtype, master, keep_fp32=keep, bucket_view=bool(keep))
            train(ddp, mw, MICRO // ranks, rank, ranks)
            out[dtype, master, keep] = masters(mw)
            assert not mw.state.get(mw.masters.by_name["unused.weight"][1].master)
    return out


def codes(mw):
    return {
        (i, name): state[name] for i, state in mw.optimizer.state_dict()["state"].items() for name in moments8.BUFFERS
    }


def resumed_with_codes(rank, ranks):
    """What rank 0 saves goes on as if nothing had happened; (the state, where training ended) for one process."""
    ddp, mw = build("bf16", CODED)
    train(ddp, mw, MICRO // ranks, rank, ranks, range(3))
    saved = [copy.deepcopy(mw.state_dict()) if rank == 0 else None]
    dist.broadcast_object_list(saved)
    again, other = build("bf16", CODED, seed=rank + 1)
    other.load_state_dict(copy.deepcopy(saved[0]))
    for model, wrapped in ((ddp, mw), (again, other)):
        train(model, wrapped, MICRO // ranks, rank, ranks, range(3, STEPS))
    assert same(masters(mw), masters(other)) and same(codes(mw), codes(other))
    everyone = [None] * ranks
    dist.all_gather_object(everyone, codes(mw))
    assert all(same(codes(mw), found) for found in everyone)
    assert {tensor.dtype for tensor in codes(mw).values()} == {torch.int8, torch.uint8}
    return saved[0], masters(mw)


def plain_ddp_keeps_ranks_equal(rank, ranks):
    for dtype, master in MODES:
        ddp, mw = build(dtype, master, attach=False)
        for i in range(3):
            mw.backward(loss_of(ddp, ranks * i + rank))
            assert mw.step()
        mine = torch.cat([m.flatten() for m in masters(mw).values()])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first)


def nan_on_one_rank(rank, ranks):
    for dtype, master in MODES:
        for wrapped in (True, False):
            ddp, mw = build(dtype, master, wrap=wrapped)
            mw.backward(loss_of(ddp, 0))
            assert mw.step()
            before = masters(mw)
            x = torch.full((2, 6), torch.nan) if rank == ranks - 1 else torch.ones(2, 6)
            mw.backward(ddp(x).sum())
            assert mw.step() is False
            assert same(before, masters(mw)) and mw.skipped_steps == 1
            mw.backward(loss_of(ddp, 1))
            assert mw.step()


def nan_in_an_unreduced_micro_step(rank, ranks):
    ddp, mw = build("bf16", "fp32")
    before = masters(mw)
    with ddp.no_sync():
        mw.backward(ddp(torch.full((2, 6), torch.nan) if rank == 0 else torch.ones(2, 6)).sum())
    mw.backward(loss_of(ddp, 1))
    assert mw.step() is False
    assert same(before, masters(mw))


def giving_up_happens_on_all_ranks_at_once(rank, ranks):
    ddp, mw = build("bf16", "fp32", loss_scale=LossScale.static(1.0, patience=3))
    for step in range(3):
        mw.backward(ddp(torch.full((2, 6), torch.nan) if rank == 1 else torch.ones(2, 6)).sum())
        if step < 2:
            assert mw.step() is False
    with pytest.raises(TrainingError, match=f"on rank {rank}") as error:
        mw.step()
    assert ("input is not finite already (argument 0)" in str(error.value)) == (rank == 1)


def accumulating_without_attach_is_refused(rank, ranks):
    ddp, mw = build("bf16", "fp32", attach=False)
    mw.backward(loss_of(ddp, rank))
    loss = loss_of(ddp, rank)
    with pytest.raises(UserError, match="call attach"):
        mw.backward(loss)


def averaging_survives_exposing_the_masters(rank, ranks):
    """Assigning p.data of another dtype would drop DDP's hook and end the averaging."""
    for attach in (True, False):
        ddp, mw = build("bf16", "fp32", attach=attach)
        for write in (False, True):
            with mw.exposed(write=write):
                assert ddp.module.body[0].weight.dtype == torch.float32
        ddp.module.load_state_dict(ddp.module.state_dict())
        mw.backward(ddp(torch.full((2, 6), float(rank + 1))).sum())
        own = mw.gradient(ddp.module.body[3].weight).clone()
        first = own.clone()
        dist.broadcast(first, 0)
        assert torch.equal(own, first)


def ranks_that_started_apart_are_made_equal_or_refused(rank, ranks):
    """DDP broadcasts the half weights of rank 0; from masters of their own, ranks would drift apart at once."""
    for dtype, master in MODES:
        ddp, mw = build(dtype, master, seed=rank)
        first = torch.cat([m.flatten() for m in masters(mw).values()])
        assert torch.equal(first, torch.cat([m.flatten() for m in masters(build(dtype, master, False)[1]).values()]))
        mw.backward(loss_of(ddp, rank))
        assert mw.step()
        mine = torch.cat([m.flatten() for m in masters(mw).values()])
        first = mine.clone()
        dist.broadcast(first, 0)
        assert torch.equal(mine, first)
        ddp, mw = build(dtype, master, attach=False, seed=rank)
        with pytest.raises(UserError, match=r"started from different weights.* call attach"):
            mw.backward(loss_of(ddp, rank))


CHECKS = [
    ranks_that_started_apart_are_made_equal_or_refused,
    plain_ddp_keeps_ranks_equal,
    nan_on_one_rank,
    nan_in_an_unreduced_micro_step,
    giving_up_happens_on_all_ranks_at_once,
    accumulating_without_attach_is_refused,
    averaging_survives_exposing_the_masters,
]


def worker(rank, ranks, folder):
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=ranks, timeout=timedelta(seconds=60)
    )
    for check in CHECKS:
        check(rank, ranks)
        dist.barrier()
    torch.save(equal_to_one_rank(rank, ranks), f"{folder}/masters-{rank}.pt")
    torch.save(resumed_with_codes(rank, ranks), f"{folder}/resumed-{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def one_rank():
    out = {}
    for dtype, master in MODES:
        for keep in ((), ("norms",)):
            model, mw = build(dtype, master, wrap=False, keep_fp32=keep)
            train(model, mw, MICRO, 0, 1)
            out[dtype, master, keep] = masters(mw)
    return out


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks(ranks, one_rank, tmp_path):
    """All CHECKS pass on every rank, and what was trained equals one rank with accumulation."""
    processes.ranks(worker, (ranks, str(tmp_path)), ranks)
    for rank in range(ranks):
        for mode, actual in torch.load(tmp_path / f"masters-{rank}.pt", weights_only=True).items():
            for name, expected in one_rank[mode].items():
                torch.testing.assert_close(actual[name], expected, rtol=1e-5, atol=1e-6)
    state, ended = torch.load(tmp_path / "resumed-0.pt", weights_only=True)
    model, mw = build("bf16", CODED, wrap=False, seed=7)
    mw.load_state_dict(state)
    train(model, mw, MICRO, 0, 1, range(3, STEPS))
    for name, found in masters(mw).items():
        torch.testing.assert_close(found, ended[name], rtol=1e-5, atol=1e-6)
