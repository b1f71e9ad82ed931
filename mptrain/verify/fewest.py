"""The fewest elements with which something is right, found in few trials.

    harm         elements in the order of the harm that each does alone: the first n go together, n by bisection
    alike        of those left, elements that do the same in all layers go together, the largest groups first; then of
                 each group that stayed the first n
    one by one   what is left, in groups of halving size (delta debugging; Zeller, Hildebrandt 2002)

Harm and likeness only order the trials; what is returned is right by a trial of it as it is. With e elements left
after the first two, the third takes about 2 e log(e) trials more: it is for small programs.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Mapping, Sequence

Right = Callable[[list[str]], bool]


def fewest(
    candidates: Sequence[str],
    right: Right,
    *,
    harm: Mapping[str, float],
    alike: Mapping[str, Hashable],
    one_by_one: Callable[[int], bool],
) -> list[str]:
    """A part of `candidates`, in reverse order, that is right, as all of them are.

    candidates: those to drop first, first. harm: of an element alone, infinite where it is not said. alike: what
    elements of one group have in common. one_by_one: whether to try every element of so many that are left; then no
    single one of the result can be dropped.
    """
    kept = list(candidates)

    def without(dropped: Collection[str]) -> list[str]:
        gone = set(dropped)
        return [name for name in kept if name not in gone]

    def drop(group: Sequence[str]) -> None:
        nonlocal kept
        ordered = sorted(group, key=lambda name: harm.get(name, float("inf")))
        count = _most(len(ordered), lambda n: right(without(ordered[:n])))
        kept = without(ordered[:count])

    drop(kept)
    groups: dict[Hashable, list[str]] = {}
    for name in kept:
        groups.setdefault(alike[name], []).append(name)
    if len(groups) < len(kept):
        stayed = []
        for group in sorted(groups.values(), key=len, reverse=True):  # one trial each, before the many of a part
            if right(without(group)):
                kept = without(group)
            else:
                stayed.append(group)
        for group in stayed:
            drop(group)
    if one_by_one(len(kept)):
        kept = _halving(kept, right)
    return kept[::-1]


def _most(count: int, right: Callable[[int], bool]) -> int:
    """The largest n up to count that is right, as 0 is and as all below it are."""
    if not count or right(count):
        return count
    low, high = 0, count
    tried = 1  # mostly none can go, or few
    while high - low > 1:
        if right(tried):
            low = tried
        else:
            high = tried
        tried = (low + high) // 2
    return low


def _halving(candidates: list[str], right: Right) -> list[str]:
    """A part of which no single element can be dropped."""
    kept = candidates
    size = (len(kept) + 1) // 2
    while size:
        start, before = 0, len(kept)
        while start < len(kept):
            less = kept[:start] + kept[start + size :]
            if right(less):
                kept = less
            else:
                start += size
        size = min(size // 2, len(kept)) if size > 1 else int(len(kept) < before)
    return kept
