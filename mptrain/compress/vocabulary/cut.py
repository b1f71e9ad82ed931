"""A model with fewer tokens: rows of its embeddings, of a head over tokens, and the ids in its config.

The tables are found by what transformers calls them (get_input_embeddings, get_output_embeddings), and everything that
shares their parameters goes with them. Whether that was all is shown by the model itself: on an example with the new
ids it computes what it did with the old ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from mptrain.core.embeddings import output_embedding, token_embedding
from mptrain.core.errors import ModelError
from mptrain.core.signature import TOKENS, by_name, without_cache

EXACT = 1e-5
"""of the largest output"""


@torch.no_grad()
def cut(model: nn.Module, kept: Sequence[int], example: Mapping[str, Tensor]) -> nn.Module:
    """Cut in place and return the model. kept: old ids, ascending. example: inputs with old ids, to prove it with.

    Raises ModelError where the model's tables are not known, or where it computes something else afterwards.
    """
    rows = torch.tensor(list(kept))
    table = table_of(model)
    size = len(table)
    stays = torch.zeros(size, dtype=torch.bool)
    stays[rows] = True
    example = {n: torch.where(stays[v], v, rows[-1]) if n in TOKENS else v for n, v in example.items()}
    model.eval()
    with without_cache(model):
        before = _tensors(model(**example))
        _slice(model, table, rows, size)
        _renumber(model, {old: new for new, old in enumerate(kept)}, size)
        renumbered = {
            name: torch.searchsorted(rows, value) if name in TOKENS else value for name, value in example.items()
        }
        after = _tensors(model(**renumbered))
    for name, value in before.items():
        wanted = value.index_select(-1, rows.to(value.device)) if value.shape != after[name].shape else value
        if wanted.shape != after[name].shape or (wanted - after[name]).abs().max() > EXACT * wanted.abs().max():
            raise ModelError(
                f"vocabulary: {type(model).__name__} computes another {name} once its tokens are cut: something beside"
                " its embeddings knows their ids. Drop the stage"
            )
    return model


def table_of(model: nn.Module) -> nn.Parameter:
    """The embeddings of tokens [tokens, width]. Raises ModelError where the model does not say."""
    table = token_embedding(model)
    if isinstance(table, nn.Embedding):
        return cast(nn.Parameter, table.weight)
    raise ModelError(
        f"vocabulary: {type(model).__name__} does not say where its embeddings of tokens are: give its class"
        " get_input_embeddings, or drop the stage"
    )


def _slice(model: nn.Module, table: nn.Parameter, rows: Tensor, size: int) -> None:
    head = output_embedding(model)
    head = head if isinstance(head, nn.Linear) else None
    tables = {id(table)} | ({id(head.weight)} if head is not None and len(head.weight) == size else set())
    cut_already: set[int] = set()
    for module in model.modules():
        weight = getattr(module, "weight", None)
        if id(weight) not in tables or not isinstance(module, (nn.Embedding, nn.Linear)):
            continue
        assert isinstance(weight, nn.Parameter)
        for parameter in (weight, getattr(module, "bias", None)):
            if parameter is not None and len(parameter) == size and id(parameter) not in cut_already:
                parameter.data = parameter.data[rows.to(parameter.device)].clone()
                cut_already.add(id(parameter))
        if isinstance(module, nn.Embedding):
            module.num_embeddings = len(rows)
        else:
            module.out_features = len(rows)
    for module in model.modules():
        for name, value in [*module._parameters.items(), *module._buffers.items()]:
            if value is None or id(value) in cut_already or value.shape[-1:] != (size,) or name not in _OF_TOKENS:
                continue
            value.data = value.data[..., rows.to(value.device)].clone()


_OF_TOKENS = ("bias", "final_logits_bias")
"""what a head over tokens may have beside its weight"""


def _renumber(model: nn.Module, new: Mapping[int, int], size: int) -> None:
    """Ids of special tokens in modules and configs. Raises ModelError for one that is cut."""
    for module in model.modules():
        place = getattr(module, "padding_idx", None)
        if isinstance(place, int) and place in new:
            module.padding_idx = new[place]  # type: ignore[assignment]
    for config in _configs(model):
        for name, value in list(vars(config).items()):
            if _is_named(name, value):
                listed = value if isinstance(value, list) else [value]
                lost = [number for number in listed if number not in new and number >= 0]
                if lost and all(number < size for number in lost):
                    raise ModelError(f"vocabulary: {name} {lost[0]} of the model is no token that stays; raise keep")
                renamed = [new.get(number, number) for number in listed]
                setattr(config, name, renamed if isinstance(value, list) else renamed[0])
            elif name in _NEVER_WRITTEN and isinstance(value, list):
                setattr(config, name, _renamed(value, new))
        if getattr(config, "vocab_size", None) == size:
            config.vocab_size = len(new)


def named(model: nn.Module) -> set[int]:
    """Ids of tokens that its configs name: where a text begins and ends, what pads it."""
    values = [v for config in _configs(model) for name, v in vars(config).items() if _is_named(name, v)]
    return {number for value in values for number in (value if isinstance(value, list) else [value])}


def _is_named(name: str, value: Any) -> bool:
    return name.endswith("token_id") and isinstance(value, int | list)


_NEVER_WRITTEN = ("suppress_tokens", "begin_suppress_tokens", "bad_words_ids")
"""settings of text generation: tokens, or lists of them in a row; one that is cut is not written either"""


def _renamed(listed: list[Any], new: Mapping[int, int]) -> list[Any] | None:
    found: list[Any] = []
    for entry in listed:
        ids = entry if isinstance(entry, list) else [entry]
        if all(number in new for number in ids):
            found.append([new[number] for number in ids] if isinstance(entry, list) else new[entry])
    return found or None


def _configs(model: nn.Module) -> Iterator[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        for name in ("config", "generation_config"):
            config = getattr(module, name, None)
            if config is not None:
                found[id(config)] = config
                for part in vars(config).values():
                    if hasattr(part, "to_dict") and hasattr(part, "vocab_size"):
                        found[id(part)] = part
    yield from found.values()


def _tensors(outputs: Any) -> dict[str, Tensor]:
    return {name: value.float() for name, value in by_name(outputs).items() if isinstance(value, Tensor)}
