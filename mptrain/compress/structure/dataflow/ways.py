"""The ways in which a model runs, on each of which it must compute the same shrunk as masked.

    plain          the pass in which its blocks were found
    another size   a row more, and of text a token less
    with a cache   of models that generate: the last token after the keys and values of the others
    training       in training mode, with all dropout off; where that is random all the same, it is left out

A way that the whole model does not run in is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from mptrain.compress.structure.dataflow import examples
from mptrain.compress.structure.dataflow.examples import Inputs
from mptrain.compress.structure.dataflow.record import run
from mptrain.compress.structure.dataflow.stand_in import Slots


@dataclass(frozen=True)
class Way:
    """name: for a sentence, empty for the plain one. outputs: of the whole model."""

    name: str
    run: Callable[[], Sequence[Tensor]]
    outputs: Sequence[Tensor]


def ways(model: nn.Module, slots: Slots, inputs: Inputs, outputs: Sequence[Tensor]) -> list[Way]:
    """outputs: of the plain pass."""
    found: list[Way | None] = [Way("", lambda: run(model, inputs), outputs)]
    for other in examples.others(inputs):
        if way := _way("on inputs of another size", lambda other=other: run(model, other)):  # type: ignore[misc]
            found.append(way)
            break
    if hasattr(model, "can_generate") and model.can_generate():  # type: ignore[operator]
        found.append(_way("with a cache", lambda: _with_cache(model, inputs)))
    found.append(_way("in training mode", lambda: _training(model, slots, inputs), again=True))
    return [way for way in found if way is not None]


def _way(name: str, run: Callable[[], Sequence[Tensor]], again: bool = False) -> Way | None:
    """again: whether two runs must be looked at for being the same."""
    try:
        outputs = run()
        alike = not again or all(torch.equal(a, b) for a, b in zip(outputs, run(), strict=True))
    except Exception:  # the model's code does not take it
        return None
    return Way(name, run, outputs) if alike and outputs else None


def _with_cache(model: nn.Module, inputs: Inputs) -> Sequence[Tensor]:
    """Raises KeyError for a model that reads no tokens."""
    key = "decoder_input_ids" if "decoder_input_ids" in inputs else "input_ids"
    tokens = inputs[key]
    before: Inputs = dict(inputs) | {key: tokens[:, :-1], "use_cache": True}
    if key == "input_ids" and "attention_mask" in inputs:
        before["attention_mask"] = inputs["attention_mask"][:, :-1]
    with torch.no_grad():
        cache = model(**before).past_key_values
    return run(model, dict(inputs) | {key: tokens[:, -1:], "past_key_values": cache, "use_cache": True})


def _training(model: nn.Module, slots: Slots, inputs: Inputs) -> Sequence[Tensor]:
    copies = {name: slots.now(name).clone() for name in slots.buffers}  # batch norms write into theirs
    try:
        model.train()
        with slots.swapped(copies), _NoDropout():
            return run(model, inputs)
    finally:
        model.eval()


class _NoDropout(TorchFunctionMode):
    """Dropout gives what it gets: its draws would differ with the shapes."""

    _DROPOUTS = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d, F.alpha_dropout, F.feature_alpha_dropout)

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func in self._DROPOUTS:
            return args[0] if args else kwargs["input"]
        if func is F.scaled_dot_product_attention:
            kwargs["dropout_p"] = 0.0
            args = args[:4]
        return func(*args, **kwargs)
