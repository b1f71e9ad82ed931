"""An IR compiled for throughput, with as many requests in flight as the plugin finds right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import openvino as ov

from mptrain.export.openvino.runner import CachedIr, CompiledIr, keeps_state


class IrStream:
    """threads: shared by all requests. Of an IR with a state every call is whole texts, from an empty state on."""

    def __init__(self, xml: Path | str, threads: int, precision: str = "f32") -> None:
        self._stateful = keeps_state(xml)
        self._ir = (
            CachedIr(xml, None, threads, precision, hint="THROUGHPUT")
            if self._stateful
            else CompiledIr(xml, threads, precision, hint="THROUGHPUT")
        )
        self._queue = ov.AsyncInferQueue(self._ir.compiled, 0)  # 0: OPTIMAL_NUMBER_OF_INFER_REQUESTS
        self.requests = len(self._queue)

    def __call__(self, batch: Mapping[str, np.ndarray], calls: int) -> None:
        arrays = self._ir.arrays(batch)
        for _ in range(calls):
            if self._stateful:
                self._queue[self._queue.get_idle_request_id()].reset_state()
            self._queue.start_async(arrays, share_inputs=True)
        self._queue.wait_all()

    def close(self) -> None:
        del self._queue
        self._ir.close()
