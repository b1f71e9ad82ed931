"""Causal language models as Core ML packages that keep their key-value cache between calls."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mptrain.core.errors import UserError
from mptrain.export.coreml.convert import Converted, Exported, convert, safe_half, write
from mptrain.export.torch.cached_decoder import CALL, texts
from mptrain.recipe import CoreMlShapes, CoreMlTarget
from mptrain.verify.outputs import of_model


def export_decoder(model: nn.Module, folder: Path, *, processor: Any = None, **how: Any) -> Exported:
    """Write folder/ with model.mlpackage, config.json and the processor's files. how: as `convert_decoder` takes it."""
    configs = {"config": getattr(model, "config", None), "generation": getattr(model, "generation_config", None)}
    return write(convert_decoder(model, **how), folder, processor=processor, **configs)


def convert_decoder(
    model: nn.Module,
    *,
    max_length: int,
    tokens: int | None = None,
    precision: Literal["fp32", "fp16"] = "fp32",
    target: CoreMlTarget = "iOS18",
    keep_fp32: Collection[str] = (),
    scaled_tables: bool = False,
    calibration: Sequence[Mapping[str, Tensor]] = (),
) -> Converted:
    """A causal LM as a package with its key-value cache as states, in memory.

    max_length: tokens that the cache holds. tokens: most tokens of one call, default max_length; 1 fixes the shape.
    Inputs are `input_ids` int32 [1, 1..tokens] and `position` int32 [1], the place of the first of these tokens; the
    output is `logits` [1, tokens, vocabulary]. The states key_<layer> and value_<layer>, [1, key-value heads,
    max_length, head size], are float16, as all states of Core ML are, also in an fp32 package. calibration: batches of
    input_ids and attention_mask, for fp16 as in `convert_checked`; of each text the first `tokens` tokens are used.
    Raises UserError when model, target or lengths do not fit, ExportError when the conversion fails or an fp16 package
    is wrong on the calibration batches.
    """
    tokens = max_length if tokens is None else tokens
    if target != "iOS18":
        raise UserError(f"a key-value cache needs minimum_deployment_target iOS18: {target} has no states")
    if not 1 <= tokens <= max_length:
        raise UserError(f"tokens {tokens} of a call must be 1 to max_length, {max_length}")
    into = partial(
        convert,
        model,
        {"input_ids": torch.zeros(1, 1, dtype=torch.int32), "position": torch.zeros(1, dtype=torch.int32)},
        target=target,
        shapes=CoreMlShapes(kind="ranged", batch=[1], length=[1, tokens] if tokens > 1 else [1]),
        scaled_tables=scaled_tables,
        signature=CALL,
        cache=max_length,
    )
    if precision == "fp16" and calibration:
        start = torch.zeros(1, dtype=torch.int32)
        calls = [{"input_ids": ids[:, :tokens], "position": start} for batch in calibration for ids in texts(batch)]
        texts_alone = [{"input_ids": call["input_ids"]} for call in calls]
        return safe_half(into, calls, of_model(model, texts_alone, CALL), CALL, keep_fp32)
    return into(precision=precision, keep_fp32=keep_fp32)
