"""Which dtype each tensor of a training run has.

    master     what the optimizer updates: fp32, or split into the bf16 weight and a remainder
    moments    what the optimizer keeps of gradients: fp32, or 8 bits each beside split masters
    compute    what forward and backward see: fp16 or bf16, but for the modules kept in fp32
    reduce     what gradients are summed over ranks in

Buffers (rotary frequencies, running statistics) keep their dtype, and so do modules that would
drift in half precision: running statistics (batch norm) and the ranges of fake quantizers.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeGuard

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from mptrain.core.errors import ModelError, UserError
from mptrain.core.hooks import HOOKS
from mptrain.recipe.precision import LossScale

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16}
NORMS = "norms"

Compute = Literal["fp16", "bf16"]
Master = Literal["fp32", "split"]
Moments = Literal["fp32", "int8"]


def is_number(value: Any) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@dataclass(frozen=True)
class Policy:
    """dtypes of a run. keep_fp32: substrings of parameter names, 're:REGEX', or 'norms'."""

    compute: Compute = "bf16"
    master: Master = "fp32"
    reduce: Literal["fp32", "compute"] = "fp32"
    keep_fp32: Sequence[str] = ()
    loss_scale: LossScale = field(default_factory=lambda: LossScale.static(1.0))
    moments: Moments = "fp32"

    def __post_init__(self) -> None:
        if self.compute not in DTYPES:
            raise UserError(f"the compute dtype must be 'fp16' or 'bf16', got {self.compute!r}")
        if self.master not in ("fp32", "split"):
            raise UserError(f"master must be 'fp32' or 'split', got {self.master!r}")
        if self.master == "split" and self.compute != "bf16":
            raise UserError(
                f"master 'split' needs bf16, got {self.compute}: only a bf16 weight is the high half of an fp32 number."
                " Use master='fp32' or dtype='bf16'."
            )
        if self.moments not in ("fp32", "int8"):
            raise UserError(f"moments must be 'fp32' or 'int8', got {self.moments!r}")
        if self.moments == "int8" and self.master != "split":
            raise UserError(
                f"moments 'int8' needs split masters, got master={self.master!r}: use master='split', or moments='fp32'"
            )
        if self.reduce not in ("fp32", "compute"):
            raise UserError(f"reduce must be 'fp32' or 'compute', got {self.reduce!r}")
        if isinstance(self.keep_fp32, str):
            raise UserError(f"keep_fp32 must be a list, got the string {self.keep_fp32!r}; write [{self.keep_fp32!r}]")
        for pattern in self.keep_fp32:
            try:
                re.compile(pattern.removeprefix("re:") if pattern.startswith("re:") else "")
            except (AttributeError, re.error) as error:
                raise UserError(
                    f"keep_fp32 takes substrings of parameter names, 're:REGEX' and 'norms', got {pattern!r} ({error})"
                ) from None

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.compute]


@dataclass(frozen=True)
class Kept:
    """What stays in fp32: ids of parameters, and the modules around which activations are cast."""

    parameters: set[int]
    boundaries: list[nn.Module]


def kept_in_fp32(model: nn.Module, policy: Policy) -> Kept:
    """Resolve the policy's patterns on a model.

    A module that owns a kept parameter keeps all of its own, because no layer computes with
    mixed weights, and a tied parameter is kept by all its owners. Boundaries are the topmost
    modules that are kept whole, so a pattern that names a block runs the block in fp32 inside.
    Modules that a transformers model declares itself (T5's `wo`) cast for themselves.

    Raises ModelError when a pattern matches nothing or everything.
    """
    owners = [(name, m) for name, m in model.named_modules() if _float_parameters(m)]
    unused = set(policy.keep_fp32)
    kept: set[int] = set()
    for module_name, module in owners:
        for local, parameter in _float_parameters(module):
            name = f"{module_name}.{local}".removeprefix(".")
            hits = [p for p in policy.keep_fp32 if (_is_norm(module) if p == NORMS else _matches(p, name))]
            unused.difference_update(hits)
            if hits or _has_statistics(module) or HOOKS in module_name.split("."):
                kept.add(id(parameter))
    if unused:
        some = ", ".join(n for n, _ in list(model.named_parameters())[:3])
        raise ModelError(f"keep_fp32: {sorted(unused)[0]!r} matches no parameter; names are like {some}")
    _close(kept, (m for _, m in owners))
    declared = _declared(owners, model, policy)
    ids = {id(p) for _, m in owners for _, p in _float_parameters(m)}
    if ids and ids <= kept:
        raise ModelError(
            f"keep_fp32 {list(policy.keep_fp32)} keeps every parameter; nothing is left for {policy.compute}"
        )
    return Kept(kept | declared, list(_boundaries(model, kept)))


def _float_parameters(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module._parameters.items() if p is not None and p.is_floating_point()]


def _matches(pattern: str, name: str) -> bool:
    if pattern.startswith("re:"):
        return re.search(pattern.removeprefix("re:"), name) is not None
    return pattern in name


def _is_norm(module: nn.Module) -> bool:
    return "norm" in type(module).__name__.lower()


def _has_statistics(module: nn.Module) -> bool:
    return isinstance(module, _NormBase) and module.track_running_stats


def _close(kept: set[int], modules: Iterable[nn.Module]) -> None:
    """Add what shares a module with a kept parameter, until nothing changes."""
    members = [{id(p) for _, p in _float_parameters(m)} for m in modules]
    before = -1
    while len(kept) != before:
        before = len(kept)
        for ids in members:
            if ids & kept:
                kept |= ids


def _declared(owners: Sequence[tuple[str, nn.Module]], model: nn.Module, policy: Policy) -> set[int]:
    patterns = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if policy.compute == "fp16":
        patterns |= set(getattr(model, "_keep_in_fp32_modules", None) or ())
    return {id(p) for name, m in owners if any(x in name.split(".") for x in patterns) for _, p in _float_parameters(m)}


def _boundaries(module: nn.Module, kept: set[int]) -> Iterator[nn.Module]:
    ids = {id(p) for p in module.parameters() if p.is_floating_point()}
    if not ids & kept:
        return
    called = type(module).forward is not nn.Module.forward
    if ids <= kept and called and not isinstance(module, (nn.ModuleList, nn.ModuleDict)):
        yield module
        return
    for child in module.children():
        yield from _boundaries(child, kept)
