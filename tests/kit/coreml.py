"""Small models, texts and shapes of the Core ML tests."""

import torch
from torch import nn

from kit.tiny_models import tiny
from mptrain.recipe import CoreMlShapes

RANGED = CoreMlShapes(kind="ranged", batch=[1, 4], length=[1, 32])
FIXED = CoreMlShapes(kind="fixed", batch=[2], length=[9])


def small(family, attn="sdpa", **changes):
    return tiny(family, attn, **{"n_layers" if family == "distilbert" else "num_hidden_layers": 1}, **changes)


def texts(batch, length, mask=True, seed=0):
    draw = torch.Generator().manual_seed(seed)
    found = {"input_ids": torch.randint(4, 50, (batch, length), generator=draw)}
    if mask:
        found["attention_mask"] = torch.ones_like(found["input_ids"])
        found["attention_mask"][0, max(1, length - 2) :] = 0
    return found


class TwoOutputs(nn.Module):
    """The shape of a text encoder of UForm: features of every token, and one embedding."""

    def __init__(self):
        super().__init__()
        self.table, self.up, self.down = nn.Embedding(50, 16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, input_ids, attention_mask):
        features = self.down(torch.nn.functional.gelu(self.up(self.table(input_ids))))
        weight = attention_mask.float()[..., None]
        embeddings = (features * weight).sum(1) / weight.sum(1)
        return {"features": features, "embeddings": torch.nn.functional.normalize(embeddings, dim=-1)}
