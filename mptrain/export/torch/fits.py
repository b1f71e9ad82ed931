"""Whether a model is what a precision's name says, for formats that have precisions of integers."""

from __future__ import annotations

from torch import nn

from mptrain.compress.weights import records
from mptrain.core.errors import UserError
from mptrain.core.hooks import is_quantized


def check_fits(model: nn.Module, precision: str) -> None:
    """Raises UserError: integers of activations need fake quantizers, `compressed` needs integer weights, which go
    with no other. Palettized weights are written out as the numbers they stand for, so they fit any float."""
    stored = any(isinstance(record, records.BlockQuantized) for record in records.of(model).values())
    if precision == "compressed" or stored:
        if precision != "compressed" or not stored:
            raise UserError(
                f"export precision {precision}: models with weights compressed to integers, and no others, are"
                " exported as `compressed`"
            )
    elif not is_quantized(model) and precision not in ("fp32", "fp16"):
        raise UserError(
            f"export precision {precision} needs a model with fake quantizers, and this one has none: quantize it"
            " first (`quantize` in a recipe, `mptrain export --precision int8`), or export this one as fp32 or fp16"
        )
