"""A torch model in fp16 as a `Program` of modules: what training or serving it in half precision computes.

The model really runs in fp16, with the casts of `mptrain.precision`, so what it does by its dtype counts (a mask of
finfo(x.dtype).min, a norm that computes in fp32 by itself). A unit is a module with parameters, because that is
what a recipe's `precision.keep_fp32` names; the operations of a module are those of its own forward and of
submodules without parameters.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from mptrain.core.errors import ModelError
from mptrain.core.signature import Signature, probed
from mptrain.precision.half import float_products, in_half, pattern
from mptrain.verify.outputs import rows
from mptrain.verify.overflow import Op, Watch
from mptrain.verify.programs.aten import Rounding, scopes


class HalfModules:
    """`mptrain.verify.overflow.Program` whose ops are modules of a model in fp32 and eval mode.

    batches: model inputs without labels. signature: default what running the model tells.
    """

    def __init__(
        self, model: nn.Module, batches: Sequence[Mapping[str, Tensor]], signature: Signature | None = None
    ) -> None:
        self.model, self._inputs = model, batches
        self._signature = probed(model, batches[0]) if signature is None else signature
        self._built: tuple[frozenset[str], nn.Module] | None = None
        units = [name for name, module in model.named_modules() if name and _called(module)]
        self._units = set(units)
        inputs: dict[str, dict[str, None]] = {name: {} for name in units}
        for batch in range(len(batches)):
            seen = self._watched(model, batch, None)[1].seen
            for _, module, sources in seen.values():
                if (unit := self._unit(module)) in inputs:
                    inputs[unit].update(dict.fromkeys(self._unit(seen[s][1]) for s in sources))
        # Small ones first: the search drops from the end, so that blocks go before the layers inside them.
        size = {name: sum(p.numel() for p in model.get_submodule(name).parameters()) for name in units}
        order = sorted(units, key=lambda name: size[name])
        self._ops = [
            Op(name, type(model.get_submodule(name)).__name__, name, tuple(s for s in inputs[name] if s and s != name))
            for name in order
        ]

    @property
    def ops(self) -> Sequence[Op]:
        return self._ops

    @property
    def batches(self) -> int:
        return len(self._inputs)

    def run(self, batch: int, keep: Collection[str], watch: Watch | None = None) -> Mapping[str, Tensor]:
        model = self._model(frozenset(keep))
        if watch is not None:
            return self._watched(model, batch, watch)[0]
        with torch.no_grad(), float_products():
            return rows(model(**self._inputs[batch]), self._inputs[batch], self._signature)

    def harm(self, batch: int, ops: Collection[str]) -> Mapping[str, float]:
        return {}  # a module in fp16 cannot be run on inputs in fp32

    def _model(self, keep: frozenset[str]) -> nn.Module:
        if keep >= self._units:
            return self.model
        if self._built is None or self._built[0] != keep:
            try:
                half = in_half(self.model, [pattern(name) for name in sorted(keep)])
            except ModelError:  # together they keep every parameter
                half = self.model
            self._built = keep, half
        return self._built[1]

    def _watched(self, model: nn.Module, batch: int, watch: Watch | None) -> tuple[dict[str, Tensor], Rounding]:
        def see(op: str, value: Tensor) -> None:
            unit = self._unit(recorder.seen[op][1])
            if watch is not None and unit in self._units:
                watch(unit, value)

        recorder = Rounding(None, see)
        with torch.no_grad(), float_products(), scopes(model, recorder.scope), recorder:
            outputs = model(**self._inputs[batch])
        return rows(outputs, self._inputs[batch], self._signature), recorder

    def _unit(self, module: str) -> str:
        """The module itself or the closest one around it that is a unit."""
        while module and module not in self._units:
            module = module.rpartition(".")[0]
        return module


def _called(module: nn.Module) -> bool:
    """Whether the module has parameters and a forward of its own."""
    if isinstance(module, (nn.ModuleList, nn.ModuleDict)) or type(module).forward is nn.Module.forward:
        return False
    return any(p.is_floating_point() for p in module.parameters())
