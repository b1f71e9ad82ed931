"""Second moments of layer inputs, one layer of the model at a time, while earlier layers already are compressed.

    for moments in walk(model, names, batches):      # {linear: mean x xᵀ [in, in]}
        …change those weights in place…

The inputs of the first layer are captured from the model; each layer then runs twice on every
batch, to collect and, once its weights were changed, to make the inputs of the next. Memory
holds one hidden state per calibration token and the moments of one layer. When layers do not
simply feed each other, the model runs from its beginning up to each layer instead: the
same numbers, with time quadratic in depth. What is outside the layers (heads, poolers; of a network without a list of
layers, all of it) comes last and together, on inputs that none of it has changed: from what the last layer gave, where
nothing else of the model reaches it, and nothing runs behind it.

Padding does not count. Linears with one input (query, key, value) share one matrix. Of convolutions, x is what a place
of the output sees, and with groups there is a matrix to each (unfolded.py); there padding counts.

Layers are sequential: the inputs of one need the compressed weights of those before. Several
ranks share the batches (ranks.py): each holds the hidden states of its own, and the products
x xᵀ of a batch go to all.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from mptrain.compress.calibrate.ranks import ALONE, Ranks, from_rank, told
from mptrain.compress.calibrate.unfolded import geometry, products
from mptrain.compress.structure.naming import layers_of
from mptrain.core.errors import ModelError
from mptrain.core.patch import computing
from mptrain.core.signature import Batch


@torch.no_grad()
def walk(
    model: nn.Module, names: set[str], batches: Sequence[Batch], ranks: Ranks = ALONE
) -> Iterator[dict[str, Tensor]]:
    """Yield the moments of the Linears and convolutions `names`, float64, layer by layer, on every rank.

    batches: keyword arguments of the model, the same on every rank. Raises ModelError when one never ran.
    """
    device = next(model.parameters()).device
    # one text tells how layers feed each other, and the logits of a batch would be large
    first = {name: value[:1].to(device) for name, value in batches[0].items()}
    own = [{k: v.to(device) for k, v in batch.items()} for batch in batches[ranks.index :: ranks.count]]
    turns = range(-(-len(batches) // ranks.count))  # as many on every rank; in the last some may have no batch
    with _inference(model):
        layers = layers_of(model, names)
        steps = _chained(model, layers, first, own) if layers else None
        for index, layer in enumerate(layers):
            moments = _Moments(model, {n for n in names if n.startswith(f"{layer}.")}, ranks)
            with moments.watching():
                for turn in turns:
                    for number, batch in enumerate(own[turn : turn + 1], turn):
                        moments.begin(batch)
                        if steps is not None:
                            _run(model, layer, steps[number])
                        else:
                            _run_until(model, layer, batch)
                    moments.end()
            yield moments.mean()
            if steps is not None and index + 1 < len(layers):
                for step in steps:
                    step[0] = (_hidden(_run(model, layer, step)), *step[0][1:])
        if outside := {n for n in names if not any(n.startswith(f"{layer}.") for layer in layers)}:
            calls, last_alone = _reached(model, layers, outside, first)
            moments = _Moments(model, outside, ranks)
            with moments.watching():
                for turn in turns:
                    for number, batch in enumerate(own[turn : turn + 1], turn):
                        moments.begin(batch)
                        ended = _run(model, layers[-1], steps[number]) if steps is not None and last_alone else None
                        with _giving(model, layers, ended):
                            _run_before(model, outside, batch, calls)
                    moments.end()
            yield moments.mean()


class _Moments:
    """Sums of x xᵀ over the tokens, or the places, that layers see."""

    def __init__(self, model: nn.Module, names: set[str], ranks: Ranks) -> None:
        self.ranks = ranks
        self.products: list[tuple[str, int, Tensor]] = []  # of this rank's batch, to be exchanged
        self.modules = {name: model.get_submodule(name) for name in sorted(names)}
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, int] = {}
        self.owner: dict[str, str] = {}
        self.begin({})

    def begin(self, batch: Batch) -> None:
        self.mask = batch.get("attention_mask")
        self.seen: dict[Any, tuple[str, Tensor]] = {}  # holds the tensors, for their ids must stay theirs

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
            first, _ = self.seen.setdefault((id(x), geometry(module)), (name, x))
            if self.owner.setdefault(name, first) != name:
                return
            for count, product in products(module, x, self.mask):
                if self.ranks.count == 1:
                    self._add(name, count, product)
                else:
                    self.products.append((name, count, product))

        return hook

    def _add(self, name: str, count: int, product: Tensor) -> None:
        total = product.double()
        self.sums[name] = self.sums[name].add_(total) if name in self.sums else total
        self.counts[name] = self.counts.get(name, 0) + count

    def end(self) -> None:
        """Add what the batches of this turn gave, those of all ranks in their order."""
        if self.ranks.count == 1:
            return
        own, self.products = self.products, []
        facts = told((self.owner, [(name, count, product.shape) for name, count, product in own]), self.ranks)
        self.owner = {}
        for owner, _ in facts:  # the first batch decides whose matrix a layer shares
            self.owner = owner | self.owner
        device = next(next(iter(self.modules.values())).parameters()).device
        for rank, (_, sent) in enumerate(facts):
            for number, (name, count, shape) in enumerate(sent):
                product = own[number][2] if rank == self.ranks.index else torch.empty(shape, device=device)
                from_rank(rank, product)
                if self.owner[name] == name:
                    self._add(name, count, product)

    def mean(self) -> dict[str, Tensor]:
        if never := [name for name in self.modules if name not in self.owner]:
            raise ModelError(f"{never[0]} does not run on the calibration data: add it to quantize.ignore")
        for name, total in self.sums.items():
            total /= max(1, self.counts[name])
        return {name: self.sums[self.owner[name]] for name in self.modules}


class _Stop(Exception):
    pass


def _chained(model: nn.Module, layers: list[str], first: Batch, batches: Sequence[Batch]) -> list[list[Any]] | None:
    """[args, kwargs] of the first layer for each batch; None unless each layer's input is what the one before gives.

    first: the batch by which that is found out.
    """
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
    outputs: list[Any] = []
    modules = [model.get_submodule(layer) for layer in layers]
    handles = []
    for module in modules:
        before = lambda m, args, kwargs: calls.append((args, kwargs))  # noqa: E731
        handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
        handles.append(module.register_forward_hook(lambda m, args, output: outputs.append(_hidden(output))))
    try:
        model(**first)
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

    _run_to_stop(model, batch, [module.register_forward_pre_hook(stop, with_kwargs=True)])
    return found


def _run_to_stop(model: nn.Module, batch: Batch, handles: Sequence[RemovableHandle]) -> None:
    """Run the model until a hook of these raises _Stop, or to its end; the hooks are removed."""
    try:
        model(**batch)
    except _Stop:
        pass
    finally:
        for handle in handles:
            handle.remove()


def _run(model: nn.Module, layer: str, step: list[Any]) -> Any:
    return model.get_submodule(layer)(*step[0], **step[1])


def _run_until(model: nn.Module, layer: str, batch: Batch) -> None:
    """Run the model until the layer is done."""

    def stop(*_: Any) -> None:
        raise _Stop

    _run_to_stop(model, batch, [model.get_submodule(layer).register_forward_hook(stop)])


def _run_before(model: nn.Module, names: set[str], batch: Batch, calls: int | None = None) -> list[Tensor]:
    """Run the model until these modules have been called so often, and before the last of them computes; None: to its
    end. Returns what they were given."""
    found: list[Tensor] = []

    def stop(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        found.extend(inputs[:1])
        if len(found) == calls:
            raise _Stop

    _run_to_stop(model, batch, [model.get_submodule(name).register_forward_pre_hook(stop) for name in names])
    return found


def _reached(model: nn.Module, layers: list[str], outside: set[str], first: Batch) -> tuple[int, bool]:
    """How often modules `outside` the layers are called, and whether they are given the same if every layer gives what
    the last one does: then nothing of the others reaches them."""
    outputs: list[Any] = []
    last = model.get_submodule(layers[-1]) if layers else model
    handle = last.register_forward_hook(lambda m, args, output: outputs.append(output))
    try:
        given = _run_before(model, outside, first)
    finally:
        handle.remove()
    if not layers or len(outputs) != 1:
        return len(given), False
    try:
        with _giving(model, layers, outputs[0]):
            return len(given), _same(given, _run_before(model, outside, first, len(given)))
    except Exception:  # whatever it says: what comes between the layers cannot read that
        return len(given), False


def _giving(model: nn.Module, layers: list[str], output: Any) -> AbstractContextManager[None]:
    """Every layer gives this at once; None: what it computes."""
    given = [] if output is None else [model.get_submodule(name) for name in layers]
    return computing(given, lambda *_, **__: output)


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
