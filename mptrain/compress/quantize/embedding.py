"""A token embedding in int4 while the rest of the model trains: rounded once, then it stands still.

    s     of a group of up to 64 values of a row: -m / 8 · f, with m the value of the largest magnitude and its sign,
          and f of 1, 0.95, ..., 0.6 the one with the least squared error
    q     round(w / s) in [-8, 7]; the table holds q·s

The value m becomes -8 for every f, so whoever looks for the scale in the table finds it again: the export with int4
embeddings (symmetric, group-wise) stores exactly this table. Training takes up what the rounding costs; a straight-
through gradient into the table was left out, for at rates of fine-tuning few values would ever change their integer.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mptrain.core.embeddings import output_embedding, token_embedding
from mptrain.core.errors import UserError

GROUP, LEAST = 64, 16
CLIPPED = [1.0 - 0.05 * i for i in range(9)]


def table_of(model: nn.Module) -> nn.Embedding:
    """The embedding of tokens. Raises UserError for a model without one, and where a head shares it."""
    found = token_embedding(model)
    if not isinstance(found, nn.Embedding):
        raise UserError(f"quantize.embeddings: {type(model).__name__} has no token embedding for int4; use int8")
    if getattr(output_embedding(model), "weight", None) is found.weight:
        raise UserError(
            "quantize.embeddings: a head shares the token embedding, and would stand still with it; use int8"
        )
    group_of(found.embedding_dim)
    return found


def group_of(width: int, asked: str = "quantize.embeddings") -> int:
    """The largest group of at most 64 values that divides a row evenly. Raises UserError, of what asked, below 16."""
    group = next(g for g in range(min(GROUP, width), 0, -1) if width % g == 0)
    if group < LEAST:
        raise UserError(f"{asked}: an embedding of width {width} has no groups of 16 to 64; use int8")
    return group


@torch.no_grad()
def rounded(weight: Tensor) -> Tensor:
    """[tokens, width] on the lattice, in its dtype."""
    groups = weight.float().reshape(weight.shape[0], -1, group_of(weight.shape[1]))
    largest = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    best = torch.full_like(largest, torch.inf)
    found = groups.clone()
    for factor in CLIPPED:
        # the scale is stored in half; of a group of zeros any will do
        scale = (largest * (-factor / 8)).half().float()
        scale = torch.where(scale == 0, torch.ones_like(scale), scale)
        made = (groups / scale).round().clamp(-8, 7) * scale
        error = (made - groups).square().sum(-1, keepdim=True)
        found = torch.where(error < best, made, found)
        best = torch.minimum(best, error)
    return found.reshape(weight.shape).to(weight.dtype)
