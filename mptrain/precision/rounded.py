"""A half checkpoint does not become the masters in silence.

Told are parameters that arrive in half, and fp32 ones that were read from half: there the last bits of every
mantissa are 0, 16 for bf16 and 13 for fp16. Of half weights that are loaded later, those equal to the model's own
keep their masters; others are taken over, and told.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.precision.master import Masters
from mptrain.precision.policy import DTYPES

log = logging.getLogger(__name__)

UNUSED_BITS = 0x1FFF


def tell_of(trained: Sequence[Tensor]) -> None:
    """Warn when the parameters that masters are made of were rounded before."""
    half = [p.dtype for p in trained if p.dtype in DTYPES.values()]
    matrices = [p for p in trained if p.dtype == torch.float32 and p.dim() > 1]
    if half:
        _warn(f"{len(half)} of {len(trained)} trained parameters arrive in {str(half[0]).removeprefix('torch.')}")
    elif matrices and all(map(_came_from_half, matrices)):
        _warn("the weights are fp32, but all are numbers of half precision, so a half checkpoint was read")


def keep_masters(model: nn.Module, masters: Masters, state: dict[str, Any], prefix: str) -> None:
    """Replace what `load_state_dict` is about to load by the master, where it is the half weight of it."""
    told = set()
    for name, p in model.named_parameters(remove_duplicate=False):  # a tied one is loaded once for each name
        value = state.get(prefix + name)
        found = masters.by_id.get(id(p)) or masters.by_name.get(name)
        if found is None or not isinstance(value, Tensor) or value.dtype not in DTYPES.values():
            continue
        flat, entry = found
        if value.dtype == p.dtype and value.shape == p.shape and torch.equal(value.to(p.device), p.detach()):
            state[prefix + name] = flat.read_master(entry)
        else:
            told.add(entry.name)
    if told:
        _warn(
            f"{len(told)} of {len(masters.by_name)} parameters are loaded from half weights (load_state_dict of"
            " MasterWeights brings masters)"
        )


def _came_from_half(p: Tensor) -> bool:
    """Whether no value uses the bits that half precision lacks, and not all are the same (zeros, ones)."""
    if not p.numel():
        return False
    for rows in (p.detach()[:1], p.detach()):  # one row tells, for weights that are fp32
        if (rows.contiguous().view(torch.int32) & UNUSED_BITS).any():
            return False
    return bool((p != p.flatten()[0]).any())


def _warn(what: str) -> None:
    log.warning(
        "%s: their masters start from those rounded values. If there is an fp32 checkpoint, load that one"
        " (dtype=torch.float32).",
        what,
    )
