"""Texts with some tokens replaced, to distil on: what the teacher says of them is right whatever they say.

A small model that sees the same few texts epoch after epoch learns the teacher's answers to these by heart. Other
tokens in the place of some make texts that it has not seen, of the same lengths and words (masking in Tang et al.
2019, arXiv 1903.12136; SwitchOut in Wang et al. 2018, arXiv 1808.07512, draws from the vocabulary). A token that every
text of the batch has, such as those that begin and end one, stays, and padding too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mptrain.core.errors import ModelError


def replaced(ids: Tensor, mask: Tensor | None, share: float) -> Tensor:
    """ids: int64 [batch, length]; mask: the same shape, 0 where there is padding, or None. Each token that may go is
    replaced with the probability `share` by one drawn from all of the batch that may go. Draws from torch's generator.
    Raises ModelError for other shapes."""
    if ids.dim() != 2 or ids.dtype.is_floating_point or (mask is not None and mask.shape != ids.shape):
        raise ModelError(
            f"distill.replace_tokens: input_ids of shape {tuple(ids.shape)} are no row of tokens to each text; drop it"
        )
    read = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()
    rows = torch.arange(len(ids), device=ids.device)[:, None].expand_as(ids)
    once = torch.stack([rows[read], ids[read]]).unique(dim=1)[1]
    tokens, texts = once.unique(return_counts=True)
    free = read & ~torch.isin(ids, tokens[texts == len(ids)])
    pool = ids[free]
    if not len(pool):
        return ids
    hit = free & (torch.rand(ids.shape, device=ids.device) < share)
    return torch.where(hit, pool[torch.randint(len(pool), ids.shape, device=ids.device)], ids)
