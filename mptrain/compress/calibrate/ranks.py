"""Compression shared out over the processes of a launch, with the result of one process, bit for bit.

    weights    each is compressed by one rank, the costliest first to the rank with the least to do.
               All ranks know the assignment from the costs; records go from their owner to all.
    batches    rank r takes batches r, r + count, …; what they give is added up on every rank in
               the order of the batches, so that sums are rounded as in one process

A rank that fails while it compresses a weight tells the others, and all raise its error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process among those that share the work; with count > 1, torch.distributed is initialised."""

    index: int = 0
    count: int = 1


ALONE = Ranks()


def assign(costs: Mapping[str, float], count: int) -> dict[str, int]:
    """The rank of each item, in the order of `costs`: longest processing time first (Graham 1969)."""
    loads = [0.0] * count
    owners = dict.fromkeys(costs, 0)
    for name in sorted(costs, key=lambda n: -costs[n]):  # stable: equal costs keep their order on every rank
        owners[name] = loads.index(min(loads))
        loads[owners[name]] += costs[name]
    return owners


def share(
    owners: Mapping[str, int], work: Callable[[str], T], ranks: Ranks, threads: int = 1
) -> Iterator[tuple[str, T]]:
    """(name, work(name)) in the order of `owners`, on every rank; `work` runs on the owner alone.

    What `work` returns is pickled. Every rank must iterate to the end. threads: items that a rank
    works on at once, for work that runs on one core.
    """
    if ranks.count == 1:
        yield from zip(owners, _each(work, owners, threads))
        return

    def attempt(name: str) -> Any:
        try:
            return work(name)
        except Exception as error:
            return error

    own = [name for name, owner in owners.items() if owner == ranks.index]
    done: dict[str, Any] = dict(zip(own, _each(attempt, own, threads)))
    for name, owner in owners.items():
        found = [done.pop(name, None)]
        dist.broadcast_object_list(found, src=owner)
        if isinstance(found[0], Exception):
            raise found[0]
        yield name, found[0]


def _each(work: Callable[[str], T], names: Iterable[str], threads: int) -> Iterator[T]:
    if threads == 1:
        yield from map(work, names)
        return
    with ThreadPoolExecutor(threads) as pool:
        yield from pool.map(work, names)


def rounds(items: Iterable[T], ranks: Ranks) -> Iterator[list[T]]:
    """The items in order, `ranks.count` at a time: the i-th of a round is rank i's; the last may be short."""
    remaining = iter(items)
    while found := list(islice(remaining, ranks.count)):
        yield found


def from_rank(rank: int, tensor: Tensor) -> Tensor:
    """`tensor` as `rank` has it, written into that of every other rank."""
    dist.broadcast(tensor, src=rank)
    return tensor


def told(fact: T, ranks: Ranks) -> list[T]:
    """The facts of all ranks, in their order."""
    found: list[Any] = [None] * ranks.count
    dist.all_gather_object(found, fact)
    return found
