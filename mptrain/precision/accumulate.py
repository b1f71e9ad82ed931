"""Gradients of several micro-steps, summed in fp32.

Autograd adds half gradients in half, which loses 0.3-1.1% over a few bf16 micro-steps. So before
the next micro-step runs, what the last one left in `p.grad` is added to an fp32 buffer and freed.
A step of one micro-step never makes the buffer.

Under DDP only the last micro-step reduces. Its communication hook adds the fp32 sums of the others
to each bucket and all-reduces the total, so ranks are summed in fp32 as well, and the overlap of
communication with backward stays. DDP then writes its buckets to `p.grad`; those are dropped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from mptrain.precision.flat import Entry, Flat


@torch.no_grad()
def fold(flat: Flat) -> None:
    """Move the gradients of a Flat's parameters into its fp32 buffer."""
    for entry in flat.entries:
        grad, entry.parameter.grad = entry.parameter.grad, None
        if grad is None or entry.group is None:
            continue
        if entry.reduced:
            entry.accumulated = True
            entry.reduced = False
            continue
        total = flat.view(flat.gradients(), entry)
        if entry.accumulated:
            total.add_(grad)
        else:
            total.copy_(grad)
        entry.accumulated = True


def clear(flat: Flat) -> None:
    for entry in flat.entries:
        entry.parameter.grad = None
        entry.accumulated = entry.reduced = False


def reduce_in_fp32(ddp: DistributedDataParallel, by_id: dict[int, tuple[Flat, Entry]], wire: torch.dtype) -> None:
    """Register the hook that means gradients over the ranks, fp32 sums included, in dtype `wire`."""
    group = ddp.process_group
    ranks = dist.get_world_size(group)

    def mean(total: Tensor, dtype: torch.dtype) -> torch.futures.Future[list[Tensor]]:
        return dist.all_reduce(total.to(dtype).div_(ranks), group=group, async_op=True).get_future()

    def hook(_state: Any, bucket):  # unannotated, because DDP compares annotations and refuses strings
        buffer = bucket.buffer()
        if buffer.dtype == torch.float32:
            return mean(buffer, torch.float32).then(lambda f: f.value()[0])
        total = buffer.float()
        # a bucket and a Flat lay out the elements of one parameter in the same order
        members = [
            (*by_id[id(p)], slice(start := g.storage_offset() - buffer.storage_offset(), start + g.numel()))
            for p, g in zip(bucket.parameters(), bucket.gradients(), strict=True)
        ]
        for flat, entry, part in members:
            if entry.accumulated:
                total[part].add_(entry.part(flat.gradients()))

        def keep(future: torch.futures.Future[list[Tensor]]) -> Tensor:
            result = future.value()[0]
            for flat, entry, part in members:
                if entry.group is not None:
                    entry.part(flat.gradients()).copy_(result[part])
                    entry.reduced = True
            return buffer

        return mean(total, wire).then(keep)

    ddp.register_comm_hook(None, hook)


def scale(flats: Sequence[Flat], factor: float) -> None:
    """Multiply gathered gradients: those in the fp32 buffers, and those of fp32 parameters."""
    for flat in flats:
        if flat.grad is not None:
            flat.grad.mul_(factor)
        if flat.dtype == torch.float32:
            for entry in flat.entries:
                if entry.parameter.grad is not None:
                    entry.parameter.grad.mul_(factor)
