"""An ONNX file as a function of named inputs, computed by onnxruntime on the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from torch import Tensor

from mptrain.core.errors import ExportError
from mptrain.export.facts import Facts
from mptrain.export.onnx.facts import facts

TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int64)": np.int64,
    "tensor(bool)": np.bool_,
}


class Session:
    """threads: of one operation, default all usable ones. Raises ExportError for a file that onnxruntime refuses.

    Half and integer outputs come as they are in the file.
    """

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        self.path = Path(path)
        options = ort.SessionOptions()
        options.log_severity_level = 3  # errors; warnings tell of nodes that shape inference cannot follow
        options.intra_op_num_threads = threads or 0
        options.inter_op_num_threads = 1
        try:
            self._session = ort.InferenceSession(str(self.path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own, of many types
            reason = " ".join(str(error).split())[-300:]
            raise ExportError(
                f"{self.path}: onnxruntime {ort.__version__} cannot load it (…{reason}). The file or its .data is"
                " damaged or not whole, or an operation is too new for it: export the model again."
            ) from error
        self.inputs = {port.name: port.type for port in self._session.get_inputs()}
        self.outputs = [port.name for port in self._session.get_outputs()]

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Takes torch tensors or arrays of any width; inputs that the file lacks are dropped."""
        missing = [name for name in self.inputs if name not in batch]
        if missing:
            raise ExportError(f"{self.path} needs the inputs {list(self.inputs)}, the batch lacks {missing}")
        arrays = {name: _array(batch[name], kind) for name, kind in self.inputs.items()}
        return dict(zip(self.outputs, self._session.run(self.outputs, arrays)))

    def facts(self) -> Facts:
        return facts(self.path)

    def close(self) -> None:
        del self._session


def _array(value: Tensor | np.ndarray, kind: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    return np.ascontiguousarray(array, TYPES.get(kind, array.dtype))
