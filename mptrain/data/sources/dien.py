"""Deep interest evolution network (Zhou et al. 2019) in plain torch: how likely is a click on an item, after a history.

    e      embeddings of the item offered, e_0, and of the history, e_1 … e_n
    GRU    g_t of e_t, the interests: u, r gates of (e_t, g_{t−1}), g_t = g_{t−1} + u (new − g_{t−1})
    a      attention of the item to the interests: sigmoid(g_t · W e_0), not normalized over t, as DIN has it
    AUGRU  s_t of g_t, how the interest in the item went: as a GRU, with a_t u in place of u
    logit  of e_0, s_n, the mean m of e_1 … e_n, and the products e_0 s_n and e_0 m, by two layers

At padding a_t is 0, so that s_t stays what it was, and s_n is the last of any row. Without the auxiliary loss of the
paper. Both recurrences are still loops in exported files (`mptrain.Recurrence`).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mptrain.core.recurrence import Recurrence


class Gated(nn.Module):
    """A step of a GRU whose inputs have been multiplied before: x is [batch, 3 · size], of both gates and of what is
    new, and where it is attentive [batch, 3 · size + 1], with the attention last."""

    def __init__(self, size: int, attentive: bool) -> None:
        super().__init__()
        self.parts = [2 * size, size, *([1] if attentive else [])]
        self.hidden = nn.Linear(size, 3 * size)

    def forward(self, x: Tensor, state: Tensor) -> Tensor:
        gates, new, *attention = x.split(self.parts, -1)
        gates_before, new_before = self.hidden(state).split(self.parts[:2], -1)
        update, reset = torch.sigmoid(gates + gates_before).chunk(2, -1)
        if attention:
            update = update * attention[0]
        return state + update * (torch.tanh(new + reset * new_before) - state)


class Dien(nn.Module):
    """input_ids [batch, 1 + n], the item and its history, attention_mask of the same shape, to logits [batch, 1]."""

    def __init__(self, vocabulary: int, size: int) -> None:
        super().__init__()
        self.items = nn.Embedding(vocabulary, size)
        nn.init.normal_(self.items.weight, std=0.1)
        self.to_interests, self.interests = nn.Linear(size, 3 * size), Recurrence(Gated(size, attentive=False))
        self.attention = nn.Linear(size, size, bias=False)
        self.to_evolution, self.evolution = nn.Linear(size, 3 * size), Recurrence(Gated(size, attentive=True))
        self.hidden, self.out = nn.Linear(5 * size, 2 * size), nn.Linear(2 * size, 1)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        known = self.items(input_ids)
        item, history = known[:, 0], known[:, 1:]
        mask = attention_mask[:, 1:].to(known.dtype)
        begin = torch.zeros_like(item)
        interests = self.interests(self.to_interests(history), begin)
        weights = torch.sigmoid((interests * self.attention(item)[:, None]).sum(-1)) * mask
        evolution = self.evolution(torch.cat([self.to_evolution(interests), weights[..., None]], -1), begin)[:, -1]
        mean = (history * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1.0)
        return self.out(torch.relu(self.hidden(torch.cat([item, evolution, mean, item * evolution, item * mean], -1))))


def dien(vocabulary: int = 35, size: int = 32) -> nn.Module:
    """vocabulary: tokens, of which an item is one. size: of an embedding and a state."""
    return Dien(vocabulary, size)
