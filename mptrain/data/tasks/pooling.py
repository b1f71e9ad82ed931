"""From the vectors of tokens to that of a text, as the model's own 1_Pooling/config.json says (sentence-transformers).

    mean      Σ m_t h_t / Σ m_t            cls       the first token that counts     max    the largest of each place
    sqrt_len  Σ m_t h_t / sqrt(Σ m_t)      weighted  Σ m_t t h_t / Σ m_t t           last   the last token that counts

Several modes are laid end to end. A model that does not say is pooled by the mean.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from mptrain.core.errors import ModelError

FILE, MODULES = "1_Pooling/config.json", "modules.json"
_FLAGS = {
    "cls_token": "cls",
    "mean_tokens": "mean",
    "max_tokens": "max",
    "mean_sqrt_len_tokens": "sqrt_len",
    "weightedmean_tokens": "weighted",
    "lasttoken": "last",
}
_NAMES = {"mean_sqrt_len": "sqrt_len", "weightedmean": "weighted", "lasttoken": "last"}


def pooling_of(source: str) -> tuple[str, ...]:
    """The modes of a model. source: folder or hub name. Raises ModelError for a mode or module that is unknown here."""
    modules = _json(source, MODULES) or []
    known = ("Transformer", "Pooling", "Normalize")
    others = [m["type"] for m in modules if m.get("type", "").rpartition(".")[2] not in known]
    if others:
        raise ModelError(
            f"model.path: {source} computes its sentence vectors with {others[0]}, which is not read here, so it would"
            f" be scored as another model. Supported are {', '.join(known)}."
        )
    found = _json(source, FILE)
    if found is None:
        return ("mean",)
    modes = found.get("pooling_mode")
    if modes is not None:
        modes = [modes] if isinstance(modes, str) else list(modes)
        chosen = tuple(_NAMES.get(mode, mode) for mode in modes)
    else:
        chosen = tuple(mode for flag, mode in _FLAGS.items() if found.get(f"pooling_mode_{flag}"))
    if not chosen or set(chosen) - set(_FLAGS.values()):
        raise ModelError(f"model.path: {source}/{FILE} has the pooling {modes or found}, which is not known here.")
    return chosen


def pooled(hidden: Tensor, mask: Tensor, modes: tuple[str, ...] = ("mean",)) -> Tensor:
    """hidden [b, s, h], mask [b, s] to float32 vectors [b, h · modes] of length 1."""
    hidden, mask = hidden.float(), mask.to(hidden.device).float()[..., None]
    count = mask.sum(1).clamp(min=1.0)
    places = torch.arange(1, hidden.shape[1] + 1, device=hidden.device)[None, :, None]
    rows = torch.arange(len(hidden), device=hidden.device)
    parts = {
        "mean": lambda: (hidden * mask).sum(1) / count,
        "sqrt_len": lambda: (hidden * mask).sum(1) / count.sqrt(),
        "weighted": lambda: (hidden * mask * places).sum(1) / (mask * places).sum(1).clamp(min=1.0),
        "max": lambda: hidden.masked_fill(mask == 0, float("-inf")).amax(1),
        "cls": lambda: hidden[rows, mask[..., 0].argmax(1)],
        "last": lambda: hidden[rows, (mask * places)[..., 0].argmax(1)],
    }
    return normalize(torch.cat([parts[mode]() for mode in modes], dim=-1), dim=-1)


def _json(source: str, name: str) -> Any:
    """None where the model has no such file."""
    path = Path(source) / name
    if not Path(source).is_dir():
        from transformers.utils import cached_file

        found = cached_file(
            source, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
        )
        path = Path(found) if found else path
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    except ValueError as error:
        raise ModelError(f"model.path: {path} cannot be read ({error}); copy it again.") from error
