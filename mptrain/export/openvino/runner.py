"""An IR compiled for the CPU, as a function of named inputs; one with a state, of whole texts or call by call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import openvino as ov
from openvino import opset13 as opset
from torch import Tensor

from mptrain.core.errors import ExportError
from mptrain.export.base import cannot_run
from mptrain.export.facts import Facts
from mptrain.export.openvino.facts import facts
from mptrain.export.torch.decoding import completed

Hint = Literal["LATENCY", "THROUGHPUT"]


class CompiledIr:
    """A compiled IR as a function of named inputs, on the CPU.

    threads: all usable ones by default. precision: of the floating-point part; "f32" by
    default, for OpenVINO would take bf16 on CPUs that have it. `precision` afterwards is what
    the plugin really took: on a CPU without bf16 or f16 it silently stays f32. Activations are not
    quantized on the fly, as OpenVINO does by default before compressed weights. hint: what the plugin arranges its
    threads for. Raises ExportError for a file that OpenVINO does not take.
    """

    def __init__(
        self, xml: Path | str, threads: int | None = None, precision: str = "f32", hint: Hint = "LATENCY"
    ) -> None:
        options: dict[str, Any] = {"INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": hint}
        options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = 0
        options["KV_CACHE_PRECISION"] = precision  # of a state; left to itself, the plugin rounds it to 8 bits
        if threads is not None:
            options["INFERENCE_NUM_THREADS"] = threads
        self.xml = Path(xml)
        try:
            self.compiled = ov.Core().compile_model(self.xml, "CPU", options)
        except RuntimeError as error:  # the plugin's own, of many lines
            reason = " ".join(str(error).split())[-300:]
            raise ExportError(
                f"{self.xml}: OpenVINO cannot read or compile it (…{reason}). The file or its .bin is damaged or not"
                " whole, or the plugin does not know an operation: export the model again."
            ) from error
        self.precision: str = self.compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.inputs = [port.any_name for port in self.compiled.inputs]
        self.outputs = [port.any_name for port in self.compiled.outputs]
        self._request = self.compiled.create_infer_request()

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Takes torch tensors or arrays; inputs that the IR does not have are dropped."""
        arrays = self.arrays(batch)
        try:
            results = self._request.infer(arrays, share_inputs=True)
        except RuntimeError as error:
            raise cannot_run(self.xml, "OpenVINO", arrays, error) from error
        return {name: results[i] for i, name in enumerate(self.outputs)}

    def arrays(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """What a request is given for a batch."""
        missing = [name for name in self.inputs if name not in batch]
        if missing:
            raise ExportError(f"{self.xml} needs the inputs {self.inputs}, the batch lacks {missing}")
        return {name: _array(batch[name]) for name in self.inputs}

    def facts(self) -> Facts:
        other = taken()
        found = facts(self.compiled, self.xml, self.precision)
        return found | Facts(left_to_itself=other if other != self.precision else None)

    def close(self) -> None:
        del self._request, self.compiled


class CachedIr(CompiledIr):
    """With keys and values in its state (cached.py). A call of the runner is whole texts, from an empty state on.

    max_length: tokens of the longest text; None, where nobody knows.
    """

    def __init__(
        self,
        xml: Path | str,
        max_length: int | None,
        threads: int | None = None,
        precision: str = "f32",
        hint: Hint = "LATENCY",
    ) -> None:
        super().__init__(xml, threads, precision, hint)
        self.max_length = max_length

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """input_ids and attention_mask [batch, length], default all ones, to {"logits"}; padding may stand on either
        side. Raises UserError for texts that are too long."""
        self.reset()
        return self.step(batch)

    def reset(self) -> None:
        self._request.reset_state()

    def step(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """One call, which goes on with the state. input_ids: [batch, n], the new tokens. attention_mask: [batch,
        places so far + n]. Where these are missing, positions are counted from each text's first token, and each row
        goes on with its own state (beam_idx)."""
        return super().__call__(batch)

    def arrays(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        return super().arrays(completed(batch, self.max_length))


def computes_in(precision: str) -> bool:
    """Whether the plugin takes a precision here; else it stays float32."""
    return taken({"INFERENCE_PRECISION_HINT": precision}) == precision


def taken(options: Mapping[str, str] | None = None) -> str:
    """The precision that the plugin takes here: "f32", "bf16" or "f16". Asked with a graph of one operation."""
    given = opset.parameter([1], ov.Type.f32)
    compiled = ov.Core().compile_model(ov.Model([opset.relu(given)], [given]), "CPU", dict(options or {}))
    return compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name()


def keeps_state(xml: Path | str) -> bool:
    """Whether an IR has variables; False for a file that cannot be read."""
    try:
        return bool(ov.Core().read_model(xml).get_sinks())
    except RuntimeError:
        return False


def _array(value: Tensor | np.ndarray) -> np.ndarray:
    return value.detach().cpu().numpy() if isinstance(value, Tensor) else value
