"""An IR compiled for throughput, with as many requests in flight as the plugin finds right."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

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
        # not openvino.AsyncInferQueue: what frees its model waits for threads, which may wait for Python's lock
        count = self._ir.compiled.get_property("OPTIMAL_NUMBER_OF_INFER_REQUESTS")
        self._flights = [self._ir.compiled.create_infer_request() for _ in range(count)]
        self.requests = len(self._flights)

    def __call__(self, batch: Mapping[str, np.ndarray], calls: int) -> None:
        arrays = self._ir.arrays(batch)
        for call in range(calls):
            flight = self._flights[call % self.requests]
            if call >= self.requests:
                flight.wait()
            if self._stateful:
                flight.reset_state()
            flight.start_async(arrays, share_inputs=True)
        for flight in self._flights[:calls]:
            flight.wait()

    def close(self) -> None:
        del self._flights
        self._ir.close()
