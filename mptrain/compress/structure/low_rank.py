"""An embedding as a product: a narrow table, and a Linear that widens its rows (Lan et al. 2019, arXiv 1909.11942).

A row e of the old table becomes u·W + m: the projection onto the directions in which the rows differ most, each row
counted as often as its token is read. m is the mean so weighted, W the first `rank` eigenvectors of the covariance

    C = Σ f (e - m)(e - m)ᵀ,    f = count + 1    (a token that training never reads is read once)

which is the product of that rank with the least error over what is read (Eckart & Young 1936). Its share of the trace
of C is what is `explained`.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mptrain.core.embeddings import name_in, said_embedding, token_embedding
from mptrain.core.errors import ModelError


class LowRank(nn.Module):
    """In the place of an embedding of tokens. ids: int64 of any shape; gives [..., width]."""

    def __init__(self, tokens: int, rank: int, width: int, padding_idx: int | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(tokens, rank, padding_idx)
        self.widen = nn.Linear(rank, width)

    @property
    def size(self) -> int:
        return self.table.embedding_dim

    @property
    def num_embeddings(self) -> int:
        return self.table.num_embeddings

    @property
    def embedding_dim(self) -> int:
        return self.widen.out_features

    @property
    def weight(self) -> Tensor:
        """[tokens, width]: what a model's own code may read of it. Computed, with a gradient; no parameter."""
        return self.widen(self.table.weight)

    @classmethod
    def in_place_of(cls, module: nn.Module, size: int) -> LowRank:
        """Of another's tokens and width; its values are to be loaded then. Raises ValueError for what is no embedding,
        and a rank that is not below its width."""
        if type(module) is not nn.Embedding or not 1 <= size < module.embedding_dim:
            raise ValueError(f"a product of rank {size} cannot stand in the place of {module}")
        return cls(module.num_embeddings, size, module.embedding_dim, module.padding_idx)

    def forward(self, ids: Tensor) -> Tensor:
        return self.widen(self.table(ids))


def check(model: nn.Module, asked: str) -> None:
    """Raises ModelError, of the field that asked, where the embedding of tokens cannot be a product."""
    table = token_embedding(model)
    if type(table) is not nn.Embedding or table.max_norm is not None:
        raise ModelError(f"{asked}: the token embedding of {type(model).__name__} is no plain table; set it to null")
    if table is not said_embedding(model):
        raise ModelError(f"{asked}: the token embedding is a product already; set it to null")
    users = [
        name for name, m in model.named_modules(remove_duplicate=False) if getattr(m, "weight", None) is table.weight
    ]
    if len(users) > 1:
        raise ModelError(f"{asked}: {users[0]} and {users[1]} share their table, which it would part; set it to null")


@torch.no_grad()
def factorize(model: nn.Module, rank: int, counts: Tensor) -> float | None:
    """Put a product in the place of the embedding of tokens; returns the share that it explains, 0 to 1. None for a
    table that is not wider than `rank`, which stays.

    counts: int64 [tokens], how often each is read, without padding.
    """
    table = token_embedding(model)
    assert isinstance(table, nn.Embedding)
    name = name_in(model, table)
    assert name is not None
    if table.embedding_dim <= rank:
        return None
    rows = table.weight.detach().double()
    read = counts.to(rows) + 1.0
    mean = (read @ rows) / read.sum()
    around = rows - mean
    values, vectors = torch.linalg.eigh((around * read[:, None]).T @ around)
    directions = vectors[:, -rank:].flip(1)
    # an eigenvector has no sign: the largest of each is made positive, so that the file is the same everywhere
    largest = directions.gather(0, directions.abs().argmax(0, keepdim=True))
    directions = directions * largest.sign()
    made = LowRank.in_place_of(table, rank)
    made.table.weight.copy_(around @ directions)
    made.widen.weight.copy_(directions)
    assert made.widen.bias is not None
    made.widen.bias.copy_(mean)
    made.to(table.weight.device, table.weight.dtype).train(table.training)
    model.set_submodule(name, made)
    return float(values[-rank:].sum() / values.sum()) if values.sum() > 0 else 1.0
