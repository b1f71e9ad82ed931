"""An ONNX file as a function of named inputs, computed by onnxruntime on the CPU; with a cache, also call by call."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnxruntime as ort
from torch import Tensor

from mptrain.core.errors import ExportError
from mptrain.core.signature import MASK
from mptrain.export.base import cannot_run
from mptrain.export.facts import Facts
from mptrain.export.onnx.facts import facts, together
from mptrain.export.onnx.parts import ENCODED, ENCODER, PASSED_ON, SEEN, TOKENS
from mptrain.export.torch.decoding import BEAM, PAST, completed, present

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
        self.shapes = {port.name: port.shape for port in self._session.get_inputs()}
        self.outputs = [port.name for port in self._session.get_outputs()]

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name. Takes torch tensors or arrays of any width; inputs that the file lacks are dropped."""
        missing = [name for name in self.inputs if name not in batch]
        if missing:
            raise ExportError(f"{self.path} needs the inputs {list(self.inputs)}, the batch lacks {missing}")
        arrays = {name: _array(batch[name], kind) for name, kind in self.inputs.items()}
        try:
            return dict(zip(self.outputs, self._session.run(self.outputs, arrays)))
        except Exception as error:
            raise cannot_run(self.path, f"onnxruntime {ort.__version__}", arrays, error) from error

    def facts(self) -> Facts:
        return facts(self.path)

    def close(self) -> None:
        del self._session


class CachedSession(Session):
    """With keys and values as inputs and outputs, which it hands on. A call of the runner is whole texts.

    max_length: tokens of the longest text; None, where nobody knows.
    """

    def __init__(self, path: Path | str, max_length: int | None = None, threads: int | None = None) -> None:
        super().__init__(path, threads)
        self.max_length = max_length
        self._past = [name for name in self.inputs if name.startswith(PAST)]
        self._held: dict[str, np.ndarray] = {}

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """input_ids and attention_mask [batch, length], default all ones, to {"logits"}; padding may stand on either
        side. Raises UserError for texts that are too long."""
        self.reset()
        return self.step(batch)

    def reset(self) -> None:
        self._held = {}

    def step(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """One call, which goes on with the keys and values of the one before: row i with those of row beam_idx[i].
        What of its inputs may be missing: `decoding.completed`."""
        call = completed(batch, self.max_length)
        rows, beams = len(call["input_ids"]), np.asarray(call[BEAM])
        if not self._held:
            empty = ((name, self.shapes[name]) for name in self._past)
            self._held = {name: np.zeros((rows, shape[1], 0, shape[3]), np.float32) for name, shape in empty}
        elif not np.array_equal(beams, np.arange(rows)):
            self._held = {name: value[beams] for name, value in self._held.items()}
        found = super().__call__(call | self._held)
        self._held = {name: found.pop(present(name)) for name in self._past}
        return found

    def facts(self) -> Facts:
        half = any(self.inputs[name] == "tensor(float16)" for name in self._past)
        return super().facts() | Facts(cache_precision="fp16" if half else "fp32")


class EncoderDecoder:
    """A decoder and the encoder that lies beside it, as one function of the model's inputs. Raises ExportError."""

    def __init__(self, path: Path | str, threads: int | None = None) -> None:
        self.path = Path(path)
        beside = self.path.with_name(ENCODER)
        if not beside.is_file():
            raise ExportError(f"{self.path} is a decoder, and {ENCODER} is not beside it: copy that too")
        self._encoder, self._decoder = Session(beside, threads), Session(self.path, threads)
        self.inputs = [*self._encoder.inputs, TOKENS]

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; the text is encoded anew. Inputs that the files do not have are dropped."""
        if TOKENS not in batch:
            raise ExportError(f"{self.path} needs the inputs {self.inputs}, the batch lacks {TOKENS}")
        (hidden,) = self._encoder(batch).values()
        call = {"input_ids": batch[TOKENS], ENCODED: hidden}
        return self._decoder(call | ({SEEN: batch[MASK]} if MASK in batch else {})) | {PASSED_ON: hidden}

    def facts(self) -> Facts:
        return together(self._encoder.facts(), self._decoder.facts())

    def close(self) -> None:
        self._encoder.close()
        self._decoder.close()


def opened(path: Path | str, max_length: int | None = None, threads: int | None = None) -> Session | EncoderDecoder:
    """By what the file takes: one with a cache, whose texts have up to max_length tokens; a decoder, with its encoder;
    any other."""
    if max_length is not None:
        return CachedSession(path, max_length, threads)
    session = Session(path, threads)
    if any(name.startswith(PAST) for name in session.inputs):
        return CachedSession(path, None, threads)
    return EncoderDecoder(path, threads) if ENCODED in session.inputs else session


def _array(value: Tensor | np.ndarray, kind: str) -> np.ndarray:
    array = value.detach().cpu().numpy() if isinstance(value, Tensor) else value
    return np.ascontiguousarray(array, TYPES.get(kind, array.dtype))
