"""Causal language models as Core AI assets that keep their key-value cache between calls.

One call takes one token and its position, writes its keys and values into the states `key_<layer>` and
`value_<layer>`, [1, key-value heads, max_length, head size], and gives the logits of the next token. Core AI changes
a state at places that the data says only where the number of places is fixed, so a prompt goes in token by token.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from mptrain.compress.weights import records
from mptrain.core.disk import whole
from mptrain.core.errors import ExportError, UserError
from mptrain.core.hooks import is_quantized
from mptrain.export.coreai import arguments
from mptrain.export.coreai.convert import ASSET, MASKED, Exported, converted, quiet, save
from mptrain.export.coreai.weights import stored
from mptrain.export.torch.cached_decoder import CALL, CachedDecoder
from mptrain.export.torch.complex_numbers import real_arithmetic
from mptrain.export.torch.traceable import traceable_masks


def export_decoder(model: nn.Module, folder: Path, *, max_length: int, processor: Any = None) -> Exported:
    """Write folder/ with model.aimodel, config.json and the processor's files, as `write_decoder` does."""
    with whole(folder, getattr(model, "config", None), processor, getattr(model, "generation_config", None)) as scratch:
        done = write_decoder(model, scratch, max_length=max_length)
    return replace(done, folder=folder, asset=folder / ASSET)


def write_decoder(model: nn.Module, folder: Path, *, max_length: int) -> Exported:
    """Write model.aimodel into a folder that exists; fp32.

    model: a causal LM without quantizers, float32; weights with records are stored as such. It is not changed.
    max_length: tokens that the cache holds. The asset has the inputs `input_ids` int32 [1, 1] and `position` int32
    [1], and the output `logits` float32 [1, 1, vocabulary]. Asset keeps its states, Asset.reset starts a new text.
    Raises UserError when the model does not fit, ExportError when the conversion fails.
    """
    if is_quantized(model):
        raise UserError("Core AI export with a cache: a model with quantizers; detach them first (quantizers.detach)")
    training, held = model.training, records.of(model)
    step = CachedDecoder(model, max_length).eval()
    example = (torch.zeros(1, 1, dtype=torch.long), torch.zeros(1, dtype=torch.long))
    try:
        shown = partial(model, example[0])
        with (
            torch.no_grad(),
            quiet(),
            traceable_masks(MASKED),
            real_arithmetic(model, shown),
            stored(model, held),
        ):
            graph = torch.export.export(step, example)
        with quiet():
            from coreai_torch import get_decomp_table

            graph = graph.run_decompositions(arguments.table(get_decomp_table()))  # changes buffers: not under no_grad
    except Exception as error:
        raise ExportError(
            f"torch.export could not trace {type(model).__name__} with a cache: {str(error).strip()[-600:]}."
            " Export it without (export_coreai)"
        ) from error
    finally:
        model.train(training)
    arguments.check(graph)
    return save(converted(graph, model, CALL.input_names, CALL.output_names, step.states), folder)
