"""A model's architecture, small and with random weights: for what only a forward pass tells and no weight changes."""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from mptrain.core.errors import ModelError
from mptrain.models.head import head_class
from mptrain.models.load import skeleton
from mptrain.recipe import Model

log = logging.getLogger(__name__)

LAYERS = 2
MOST = 500_000_000
"""parameters, of which almost all are then embeddings"""
_COUNTS = ("num_hidden_layers", "encoder_layers", "decoder_layers", "num_layers", "num_decoder_layers")


def probe(spec: Model, config: PreTrainedConfig, allow_code: bool = False) -> PreTrainedModel | None:
    """In eval mode on the CPU, float32, with at most two layers where the config can say so.

    None for a model of more than MOST parameters all the same. The global generator is left as it was.
    """
    options: dict[str, Any] = {"trust_remote_code": spec.trust_remote_code and allow_code}
    if "attn" in spec.model_fields_set:
        options["attn_implementation"] = spec.attn
    for fewer in (True, False):
        small = _shallow(config) if fewer else copy.deepcopy(config)
        try:
            if sum(p.numel() for p in skeleton(spec, small, allow_code).parameters()) > MOST:
                continue
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                model = head_class(spec.kind).from_config(small, dtype=torch.float32, **options)
        except Exception as error:  # a config that needs all of its layers: each architecture says so in its own way
            if not fewer:
                raise
            log.debug("no %s of %d layers: %s", config.model_type, LAYERS, error)
            continue
        if hasattr(model.config, "use_cache"):
            model.config.use_cache = False
        return model.eval()
    return None


def blank(spec: Model, config: PreTrainedConfig, allow_code: bool = False) -> nn.Module | None:
    """The model with random weights and all buffers 0, in eval mode on the CPU; None for one of more than MOST
    parameters, or that cannot be built without weights.

    For code of a user's own, of which nobody knows how to make it smaller.
    """
    try:
        model = skeleton(spec, config, allow_code)
    except ModelError:
        raise
    except Exception as error:  # such code need not work on tensors without values
        log.debug("%s cannot be built without weights: %s", spec.path, error)
        return None
    if sum(p.numel() for p in model.parameters()) > MOST:
        return None
    made = model.to_empty(device="cpu")
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(0, weight.shape[-1] ** -0.5 if weight.dim() else 1.0, generator=draw)
        for buffer in made.buffers():
            buffer.zero_()
    return made.eval()


def _shallow(config: PreTrainedConfig) -> PreTrainedConfig:
    small = copy.deepcopy(config)
    text = small.get_text_config()
    whole = {name: getattr(text, name) for name in _COUNTS if isinstance(getattr(text, name, None), int)}
    for name, count in whole.items():
        for key, value in list(vars(text).items()):  # what the config lists by layer
            if isinstance(value, list) and len(value) == count > LAYERS:
                setattr(text, key, value[:LAYERS])
        try:
            setattr(text, name, min(count, LAYERS))
        except (NotImplementedError, AttributeError):
            continue
    return small
