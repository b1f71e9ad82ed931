"""Batches of similar length, in an order that only (seed, epoch) decides.

The examples are shuffled, cut into pools of `POOL` batches, sorted by length inside a pool,
and the batches are shuffled again: padding falls by about half on text, and the order
stays random. Unlike a sampler that draws from the global generator, the order of an epoch
can be made again after a restart.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch.utils.data import Sampler

POOL = 50


class LengthGroupedSampler(Sampler[int]):
    """lengths: tokens of every example; batch_size: examples in a batch; yields indices."""

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int, *, group: bool = True) -> None:
        self.lengths = torch.as_tensor(lengths)
        self.batch_size = batch_size
        self.seed = seed
        self.group = group
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + self.epoch) % 2**63)
        order = torch.randperm(len(self.lengths), generator=generator)
        if not self.group:
            return iter(order.tolist())
        batches: list[torch.Tensor] = []
        for pool in order.split(self.batch_size * POOL):
            ordered = pool[torch.argsort(self.lengths[pool], descending=True, stable=True)]
            batches += ordered.split(self.batch_size)
        # the short batch stays last: whoever drops it, drops it once
        short = [b for b in batches if len(b) < self.batch_size]
        full = [b for b in batches if len(b) == self.batch_size]
        shuffled = [full[i] for i in torch.randperm(len(full), generator=generator).tolist()]
        return iter([i for b in shuffled + short for i in b.tolist()])
