"""How many tokens a model reads, and how many ids it knows, from its embeddings instead of from its config.

table of n positions                    n tokens
… counted from the padding's id + 1     n − padding_idx − 1    (RoBERTa, XLM-R, CamemBERT, MPNet: 514 → 512)
… with an offset of its own             n − offset             (OPT, BART: 2,050 → 2,048)
rotary, relative or sinusoidal          no limit here
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from mptrain.core.embeddings import token_embedding

_TABLES = ("position_embeddings", "position_embedding", "embed_positions", "wpe", "pos_embeddings", "embed_position")


@dataclass(frozen=True)
class Positions:
    """tokens: the most that are read. why: in words, from what the number follows."""

    tokens: int
    why: str


def positions_of(model: nn.Module) -> Positions | None:
    """Of the learned table of tokens that is shortest; None for a model without one. Weights do not matter (meta
    device)."""
    found = [
        _positions(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Embedding)
        and name.rpartition(".")[2] in _TABLES
        and not _of_patches(model.get_submodule(name.rpartition(".")[0]))
    ]
    return min(found, key=lambda positions: positions.tokens, default=None)


def _of_patches(embeddings: nn.Module) -> bool:
    """Whether a table there counts patches of a picture (CLIP) or frames of a sound (Whisper): a convolution beside it
    makes them."""
    return any(isinstance(module, nn.Conv1d | nn.Conv2d) for module in embeddings.children())


def _positions(table: nn.Embedding) -> Positions:
    rows = table.num_embeddings
    offset = getattr(table, "offset", None)
    if isinstance(offset, int):
        return Positions(rows - offset, f"{rows} positions, of which the first {offset} stand for no token")
    if table.padding_idx is not None:
        return Positions(rows - table.padding_idx - 1, f"{rows} positions, counted from pad_token_id + 1")
    return Positions(rows, f"{rows} positions")


def token_rows(model: nn.Module) -> int | None:
    """Rows of the embedding that input ids index; None where there is none."""
    table = token_embedding(model)
    return table.num_embeddings if isinstance(table, nn.Embedding) else None
