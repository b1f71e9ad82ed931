"""What an fp16 Core AI asset computes, op by op in torch, for hosts whose CPU has no fp16 arithmetic.

There Core AI's runtime does every fp16 operation in software, about 100 times as slow as fp32: scoring a test
split takes hours. The graph that the asset was made of runs instead, in fp32 with the operands and the result of
every operation rounded to fp16, but for those the asset keeps in fp32 (graph_ops). The asset itself is executed on
a few examples when it is written, and that difference is in its facts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from mptrain.core.host import host
from mptrain.core.signature import Signature, probed
from mptrain.export.coreai.convert import traced
from mptrain.export.coreai.facts import facts
from mptrain.export.facts import Facts
from mptrain.verify.programs.exported import GraphOps

NATIVE = {"avx512_fp16", "asimdhp"}
"""CPU flags of fp16 arithmetic, x86 and Arm"""


def computes_half() -> bool:
    """Whether this CPU adds and multiplies in fp16."""
    return not NATIVE.isdisjoint(host()["cpu_flags"])


class EmulatedAsset:
    """Stands in for `runner.Asset`.

    asset: the file. model: plain, float32, with the records it was exported with. example: inputs it was exported
    with. kept: operations that stay in fp32, as `Exported.half["kept_fp32"]` names them.
    """

    execution = (
        "an emulation of fp16 in torch (this CPU has no fp16 arithmetic; the asset itself was executed on a few"
        " examples), not an Apple device"
    )

    def __init__(
        self,
        asset: Path,
        model: nn.Module,
        example: Mapping[str, Tensor],
        kept: Collection[str],
        signature: Signature | None = None,
    ) -> None:
        self.asset, self._kept = asset, kept
        signature = probed(model, example) if signature is None else signature
        graph = traced(model, example, signature)
        self._ops = GraphOps(graph, signature.input_names, signature.output_names, [])

    @torch.no_grad()
    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]:
        """Outputs by name; inputs that the asset lacks are dropped."""
        outputs = self._ops.outputs({name: torch.as_tensor(value) for name, value in batch.items()}, self._kept)
        return {name: value.numpy() for name, value in outputs.items()}

    def facts(self) -> Facts:
        return facts(self.asset, self.execution)

    def close(self) -> None:
        del self._ops
