from __future__ import annotations

import torch

from mptrain.train.sampler import LengthGroupedSampler

LENGTHS = torch.randint(1, 100, (1003,), generator=torch.Generator().manual_seed(1)).tolist()


def test_every_example_once_and_only_seed_and_epoch_decide():
    sampler = LengthGroupedSampler(LENGTHS, 8, seed=3)
    first = list(sampler)
    torch.rand(5)
    assert sorted(first) == list(range(1003))
    assert list(LengthGroupedSampler(LENGTHS, 8, seed=3)) == first
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first and sorted(second) == list(range(1003))
    assert list(LengthGroupedSampler(LENGTHS, 8, seed=4)) != first


def test_batches_are_of_similar_length_and_in_random_order():
    order = list(LengthGroupedSampler(LENGTHS, 8, seed=0))
    batches = [[LENGTHS[i] for i in order[n : n + 8]] for n in range(0, 1000, 8)]
    spread = sum(max(b) - min(b) for b in batches) / len(batches)
    plain = list(LengthGroupedSampler(LENGTHS, 8, seed=0, group=False))
    plain_batches = [[LENGTHS[i] for i in plain[n : n + 8]] for n in range(0, 1000, 8)]
    plain_spread = sum(max(b) - min(b) for b in plain_batches) / len(plain_batches)
    assert spread < plain_spread / 10
    means = [sum(b) / len(b) for b in batches]
    assert means != sorted(means) and means != sorted(means, reverse=True)
    assert len(order[1000:]) == 3  # the short batch is last
