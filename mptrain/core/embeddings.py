"""Where a model says that its embeddings of tokens are."""

from __future__ import annotations

import contextlib

from torch import nn


def token_embedding(model: nn.Module) -> nn.Module | None:
    """What looks up the rows of tokens; None where the model has none, or does not say.

    Where the model says a module with a table inside, such as a product of a narrow one, it is that table.
    """
    said = said_embedding(model)
    tables = [module for module in said.modules() if isinstance(module, nn.Embedding)] if said is not None else []
    return tables[0] if len(tables) == 1 else said


def said_embedding(model: nn.Module) -> nn.Module | None:
    """What turns ids of tokens into vectors; None where the model has none, or does not say."""
    return _said(model, "get_input_embeddings")


def output_embedding(model: nn.Module) -> nn.Module | None:
    """What turns hidden states into logits of tokens; None where the model has none, or does not say."""
    return _said(model, "get_output_embeddings")


def name_in(model: nn.Module, module: nn.Module | None) -> str | None:
    """The first name of a module of the model."""
    return next((name for name, found in model.named_modules() if found is module), None)


def _said(model: nn.Module, method: str) -> nn.Module | None:
    with contextlib.suppress(NotImplementedError, AttributeError):  # of transformers' models without one
        found = getattr(model, method)()
        return found if isinstance(found, nn.Module) else None
    return None
