"""Second moments of layer inputs, one layer of the model at a time, while earlier layers already are compressed.

    for moments in walk(model, names, batches):      # {linear: mean x xᵀ [in, in]}
        …change those weights in place…

The inputs of the first layer are captured from the model; each layer then runs twice on every
batch, to collect and, once its weights were changed, to make the inputs of the next. Memory
holds one hidden state per calibration token and the moments of one layer. When layers do not
simply feed each other, the model runs from its beginning up to each layer instead: the
same numbers, with time quadratic in depth. Linears outside the layers (heads, poolers) come last.

Padding does not count. Linears with one input (query, key, value) share one matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.structure import find_structure
from mptrain.errors import ModelError

Batch = Mapping[str, Tensor]


@torch.no_grad()
def walk(model: nn.Module, names: set[str], batches: Sequence[Batch]) -> Iterator[dict[str, Tensor]]:
    """Yield the moments of the Linears `names`, float64, layer by layer.

    batches: keyword arguments of the model. Raises ModelError when a Linear never ran.
    """
    device = next(model.parameters()).device
    batches = [{name: value.to(device) for name, value in batch.items()} for batch in batches]
    with _inference(model):
        layers = _layers(model, names)
        steps = _chained(model, layers, batches) if layers else None
        for index, layer in enumerate(layers):
            moments = _Moments(model, {n for n in names if n.startswith(f"{layer}.")})
            with moments.watching():
                for number, batch in enumerate(batches):
                    moments.begin(batch)
                    if steps is not None:
                        _run(model, layer, steps[number])
                    else:
                        _run_until(model, layer, batch)
            yield moments.mean()
            if steps is not None and index + 1 < len(layers):
                for step in steps:
                    step[0] = (_hidden(_run(model, layer, step)), *step[0][1:])
        del steps
        if outside := {n for n in names if not any(n.startswith(f"{layer}.") for layer in layers)}:
            moments = _Moments(model, outside)
            with moments.watching():
                for batch in batches:
                    moments.begin(batch)
                    model(**batch)
            yield moments.mean()


class _Moments:
    """Sums of x xᵀ over the tokens that Linears see."""

    def __init__(self, model: nn.Module, names: set[str]) -> None:
        self.modules = {name: model.get_submodule(name) for name in sorted(names)}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self.begin({})

    def begin(self, batch: Batch) -> None:
        self.mask = batch.get("attention_mask")
        self.seen: dict[int, tuple[str, Tensor]] = {}  # holds the tensors, for their ids must stay theirs

    @contextmanager
    def watching(self) -> Iterator[None]:
        handles = [m.register_forward_pre_hook(self._hook(name)) for name, m in self.modules.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0]
            first, _ = self.seen.setdefault(id(x), (name, x))
            if self.owner.setdefault(name, first) != name:
                return
            if self.mask is not None and x.shape[:-1] == self.mask.shape:
                x = x[self.mask.bool()]
            x = x.reshape(-1, x.shape[-1]).float()
            product = (x.T @ x).double()
            self.sums[name] = self.sums[name].add_(product) if name in self.sums else product
            self.counts[name] = self.counts.get(name, 0) + len(x)

        return hook

    def mean(self) -> dict[str, Tensor]:
        if never := [name for name in self.modules if name not in self.owner]:
            raise ModelError(f"{never[0]} does not run on the calibration data: add it to quantize.ignore")
        for name, total in self.sums.items():
            total /= max(1, self.counts[name])
        return {name: self.sums[self.owner[name]] for name in self.modules}


def _layers(model: nn.Module, names: set[str]) -> list[str]:
    try:
        found = list(dict.fromkeys(attention.layer for attention in find_structure(model).attention))
    except ModelError:
        return []
    return [layer for layer in found if any(name.startswith(f"{layer}.") for name in names)] if found else []


class _Stop(Exception):
    pass


def _chained(model: nn.Module, layers: list[str], batches: Sequence[Batch]) -> list[list[Any]] | None:
    """[args, kwargs] of the first layer for each batch; None unless each layer's input is what the one before gives."""
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []
    modules = [model.get_submodule(layer) for layer in layers]
    handles = []
    for module in modules:
        before = lambda m, args, kwargs: calls.append((args, kwargs))  # noqa: E731
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda m, args, output: outputs.append(_hidden(output))))
    try:
        model(**batches[0])
    finally:
        for handle in handles:
            handle.remove()
    if len(calls) != len(layers) or not all(args and isinstance(args[0], Tensor) for args, _ in calls):
        return None
    for (args, kwargs), previous in zip(calls[1:], outputs):
        if args[0] is not previous or not _same((args[1:], kwargs), (calls[0][0][1:], calls[0][1])):
            return None
    return [_first_call(model, modules[0], batch) for batch in batches]


def _first_call(model: nn.Module, module: nn.Module, batch: Batch) -> list[Any]:
    found: list[Any] = []

    def stop(_: nn.Module, args: Any, kwargs: Any) -> None:
        found.extend((args, kwargs))
        raise _Stop

    handle = module.register_forward_pre_hook(stop, with_kwargs=True)
    try:
        model(**batch)
    except _Stop:
        pass
    finally:
        handle.remove()
    return found


def _run(model: nn.Module, layer: str, step: list[Any]) -> Any:
    return model.get_submodule(layer)(*step[0], **step[1])


def _run_until(model: nn.Module, layer: str, batch: Batch) -> None:
    """Run the model until the layer is done."""

    def stop(*_: Any) -> None:
        raise _Stop

    handle = model.get_submodule(layer).register_forward_hook(stop)
    try:
        model(**batch)
    except _Stop:
        pass
    finally:
        handle.remove()


def _hidden(output: Any) -> Any:
    return output[0] if isinstance(output, tuple) else output


def _same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, tuple | list) and isinstance(b, tuple | list):
        return len(a) == len(b) and all(map(_same, a, b))
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same(a[k], b[k]) for k in a)
    return isinstance(a, bool | int | float | str) and a == b


@contextmanager
def _inference(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without a key-value cache: a layer that runs twice must not see itself in it."""
    training, config = model.training, getattr(model, "config", None)
    use_cache = getattr(config, "use_cache", None)
    model.eval()
    if use_cache is not None and config is not None:
        config.use_cache = False
    try:
        yield
    finally:
        model.train(training)
        if use_cache is not None and config is not None:
            config.use_cache = use_cache
