"""Where fp32 values meet half ones inside a model.

A model that computes in half still holds fp32 tensors: inputs that are numbers, buffers, and what either was added to
or multiplied with. torch promotes in elementwise operations, which is right, and refuses the rest (a matrix product,
a layer norm). So, as autocast does,

    refused mixture    fp32 operands -> compute dtype (what an operation writes into keeps its dtype)
    refused in half    half operands -> fp32 (Fourier transforms, inverses)
    a loss of half     half operands -> fp32

and nothing else changes: a product of two fp32 tensors stays in fp32. Seeing every operation costs 4 us for each, half
of a small model's forward. So only a first forward (of each kind: training or not, names and dtypes of the inputs) is
watched. What it finds becomes a hook of the module where it happened and of all like it (`layers.*.norm`): a layer of
torch.nn casts its inputs, any other module is watched again, but not the modules that it calls.
"""

from __future__ import annotations

import contextlib
import logging
import re
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from mptrain.core.link import Link
from mptrain.precision.operands import as_it_is, down, floats, is_fp32, up

log = logging.getLogger(__name__)

Verdict = Callable[[Any, torch.dtype], Any]

HALF = (torch.float16, torch.bfloat16)
LOSSES = {
    function
    for name in dir(F)
    if name.endswith("_loss") or name in ("cross_entropy", "binary_cross_entropy", "binary_cross_entropy_with_logits")
    if callable(function := getattr(F, name))
} | {F.kl_div, F.logsigmoid, F.log_softmax, torch.log_softmax, Tensor.log_softmax}
INTO_FIRST = (
    *("__setitem__", "index_put", "index_add", "index_copy", "scatter", "masked_scatter"),
    *("addmm_", "addmv_", "addbmm_", "baddbmm_"),
)
"""beginnings of names: operations that refuse a mixture and write into their first tensor, which keeps its dtype"""
LARGEST_ERROR = 0.01
"""rounding error of an input, of its spread, from which on it is told"""


def own_half(module: nn.Module, is_half: Callable[[nn.Parameter], bool] = lambda p: p.dtype in HALF) -> bool:
    """Whether it is a layer of torch.nn that multiplies its inputs with half weights of its own."""
    kinds = [c for c in type(module).__mro__ if c.__module__.startswith("torch.nn.modules.")]
    kinds = [c for c in kinds if c.__module__.rpartition(".")[2] not in ("module", "container")]
    if not kinds or isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return False
    computed = module._modules.get("parametrizations")
    parts = [module, *(computed.children() if isinstance(computed, nn.ModuleDict) else ())]
    return any(p is not None and is_half(p) for part in parts for p in part._parameters.values())


class Meeting:
    """The hooks of one model; layers: those of torch.nn that cast their inputs from the start. half: as `own_half`."""

    def __init__(
        self,
        model: nn.Module,
        dtype: torch.dtype,
        layers: Iterable[nn.Module] = (),
        half: Callable[[nn.Module], bool] = own_half,
    ) -> None:
        self.model, self.dtype, self._half = model, dtype, half
        self._names = {module: name for name, module in model.named_modules()}
        self._like: dict[tuple[type, str], list[nn.Module]] = {}
        for module, name in self._names.items():
            self._like.setdefault(_kind(module, name), []).append(module)
        self._layers = dict.fromkeys(layers)
        self._watched: dict[nn.Module, bool] = {}
        """whether operations of a module are watched; False for those that a watched one calls"""
        self._known: set[Any] = set()
        self._told: set[str] = set()
        self._verdicts: dict[Any, Verdict] = {}
        self._mode = _Mode(self._verdicts, dtype)
        self._on = False
        self._before: list[bool | None] = []
        self._first: _First | None = None
        self._depth = 0
        self._handles: list[RemovableHandle] = []

    def install(self) -> None:
        self._handles = [
            self.model.register_forward_pre_hook(Link(self._begin), with_kwargs=True, prepend=True),
            self.model.register_forward_hook(Link(self._complete)),
            self.model.register_forward_hook(Link(self._end), always_call=True),
        ]
        for layer in self._layers:
            self._cast_inputs(layer)
        for module in self._watched:
            self._switch(module)

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []

    # -- the first forward of each kind

    def _begin(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if _traced():
            return
        self._depth += 1
        kind = (
            module.training,
            torch.is_grad_enabled(),
            *(getattr(a, "dtype", type(a)) for a in args),
            *((k, getattr(a, "dtype", type(a))) for k, a in kwargs.items()),
        )
        if self._first is None and kind not in self._known:
            named = {**{f"argument {i}": a for i, a in enumerate(args)}, **kwargs}
            inputs = {n: a for n, a in named.items() if isinstance(a, Tensor)}
            self._first = _First(self, kind, inputs, self._depth)

    def _complete(self, *_: Any) -> None:
        if not _traced() and self._first is not None and self._first.depth == self._depth:
            self._known.add(self._first.kind)

    def _end(self, *_: Any) -> None:
        if _traced():
            return
        if self._first is not None and self._first.depth == self._depth:
            first, self._first = self._first, None
            first.close()
            for met, inside in first.met.items():
                self._remember(met, inside)
        self._depth -= 1

    def _remember(self, module: nn.Module, inside: bool) -> None:
        """A layer of torch.nn casts its inputs from now on; the operations of another module are watched.

        inside: it met fp32 that is none of its inputs.
        """
        for like in self._like[_kind(module, self._names[module])]:
            if self._half(like) and not inside:
                if like not in self._layers:
                    self._layers[like] = None
                    self._cast_inputs(like)
                continue
            for one, watched in ((like, True), *((child, False) for child in _called(like))):
                if one not in self._watched:
                    self._switch(one)
                self._watched[one] = self._watched.get(one, False) or watched

    # -- what it found

    def _cast_inputs(self, layer: nn.Module) -> None:
        def hook(_layer: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
            if not any(is_fp32(a) for a in (*args, *kwargs.values())):
                return None
            if self._first is not None:
                self._first.tell(layer, [*args, *kwargs.values()])
            return down(args, self.dtype), down(kwargs, self.dtype)

        self._handles.append(layer.register_forward_pre_hook(Link(hook), with_kwargs=True))

    def _switch(self, module: nn.Module) -> None:
        def enter(*_: Any) -> None:
            if not _traced():
                self._before.append(None if self._first is not None else self._on)
                if self._first is None:
                    self._turn(self._watched[module])

        def leave(*_: Any) -> None:
            if not _traced():
                before = self._before.pop()
                if before is not None:
                    self._turn(before)

        # before a pre-hook that computes the weight (spectral norm)
        self._handles.append(module.register_forward_pre_hook(Link(enter), prepend=True))
        self._handles.append(module.register_forward_hook(Link(leave), always_call=True))

    def _turn(self, on: bool) -> None:
        if on != self._on:
            self._on = on
            self._mode.__enter__() if on else self._mode.__exit__(None, None, None)

    def name(self, module: nn.Module) -> str:
        return self._names.get(module, "")

    def tell_once(self, name: str, message: str) -> None:
        if name not in self._told:
            self._told.add(name)
            log.warning(message)


class _First:
    """One whole forward: where fp32 meets half, and which inputs lose what they say by it."""

    def __init__(self, meeting: Meeting, kind: Any, inputs: dict[str, Tensor], depth: int) -> None:
        self.meeting, self.kind, self.inputs, self.depth = meeting, kind, inputs, depth
        self.met: dict[nn.Module, bool] = {}
        """modules in which fp32 met half, and whether it was none of their inputs"""
        self._stack: list[tuple[nn.Module, tuple]] = [(meeting.model, tuple(inputs.values()))]
        self._mode = _Mode(meeting._verdicts, meeting.dtype, self._found)
        self._hooks = [
            register_module_forward_pre_hook(self._enter),
            register_module_forward_hook(self._leave, always_call=True),
        ]
        self._mode.__enter__()

    def close(self) -> None:
        self._mode.__exit__(None, None, None)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: nn.Module, args: Any) -> None:
        self._stack.append((module, args))

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if len(self._stack) > 1:
            self._stack.pop()

    def _found(self, tensors: list[Any]) -> None:
        # a loss that is made in `forward` is no module of the model
        owner, given = next((m for m in reversed(self._stack) if m[0] in self.meeting._names), self._stack[0])
        inputs = {id(x) for x in floats(given)}
        inside = not any(is_fp32(t) and id(t) in inputs for t in tensors)
        self.met[owner] = self.met.get(owner, False) or inside
        self.tell(owner, tensors)

    @torch.no_grad()
    def tell(self, module: nn.Module, tensors: list[Any]) -> None:
        """Warn when an input is rounded to something else; a time of 998 is a 1000 in bf16."""
        for name, given in self.inputs.items():
            for x in tensors:
                if not is_fp32(x) or x.data_ptr() != given.data_ptr() or x.numel() != given.numel() or x.numel() < 2:
                    continue
                dtype = self.meeting.dtype
                error = (x.to(dtype).float() - x).square().mean().sqrt()
                if not error <= LARGEST_ERROR * x.std() and bool(x.isfinite().all()):
                    share = float(error / x.std())
                    where = self.meeting.name(module)
                    keep = f", or keep that layer in fp32 (keep_fp32: ['{where}'])" if where else ""
                    self.meeting.tell_once(
                        name,
                        f"input {name} is rounded to {str(dtype).removeprefix('torch.')} in {where or 'the model'},"
                        f" which changes it by {share:.0%} of its spread (standard deviation {float(x.std()):.3g},"
                        f" largest {float(x.abs().max()):.3g}): normalise it{keep}.",
                    )


class _Mode(TorchFunctionMode):
    """Gives one dtype to what torch refuses. verdicts: what an operation needs, by function and dtypes."""

    def __init__(
        self,
        verdicts: dict[Any, Verdict],
        dtype: torch.dtype,
        found: Callable[[list[Any]], None] = lambda tensors: None,
    ) -> None:
        super().__init__()
        self._verdicts, self._dtype, self._found = verdicts, dtype, found

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(floats((args, kwargs)))
        dtypes = tuple(t.dtype for t in tensors)
        if self._dtype not in dtypes:
            return func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if func in LOSSES:
            verdict: Verdict = up
        elif torch.float32 not in dtypes:
            verdict = self._verdicts.get((func, dtypes), as_it_is)
        elif name.startswith(INTO_FIRST):
            change = up if getattr(args[0], "dtype", None) == torch.float32 else down
            self._found(tensors)
            return func(args[0], *change(args[1:], self._dtype), **change(kwargs, self._dtype))
        else:
            if (func, dtypes) not in self._verdicts:
                self._verdicts[func, dtypes] = self._judge(func, name, tensors, args, kwargs)
            verdict = self._verdicts[func, dtypes]
        if verdict is not as_it_is:
            self._found(tensors)
            return func(*verdict(args, self._dtype), **verdict(kwargs, self._dtype))
        try:
            return func(*args, **kwargs)
        except RuntimeError:
            if torch.float32 in dtypes:
                raise
            verdict = self._judge(func, name, tensors, args, kwargs, choices=(up,))  # half is refused as such
            if verdict is as_it_is:
                raise
        self._verdicts[func, dtypes] = verdict
        self._found(tensors)
        return func(*verdict(args, self._dtype), **verdict(kwargs, self._dtype))

    def _judge(
        self,
        func: Any,
        name: str,
        tensors: list[Tensor],
        args: tuple,
        kwargs: dict[str, Any],
        choices: tuple[Verdict, ...] = (),
    ) -> Verdict:
        """The first that torch takes. On the side, for an attempt that fails has saved its inputs for gradients."""
        if name.endswith("_") or name in ("batch_norm", "instance_norm") or "out" in kwargs:
            return as_it_is  # writes into something (a batch norm its statistics), which is not done twice
        devices = {t.device for t in tensors if t.device.type == "cuda"}
        for verdict in choices or (as_it_is, down, up):
            with torch.no_grad(), torch.random.fork_rng(devices), contextlib.suppress(RuntimeError):
                func(*verdict(args, self._dtype), **verdict(kwargs, self._dtype))
                return verdict
        return as_it_is  # the dtypes are not what it fails for


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The modules below that are called first; a ModuleList is none."""
    for child in module.children():
        if type(child).forward is nn.Module.forward or isinstance(child, (nn.ModuleList, nn.ModuleDict)):
            yield from _called(child)
        else:
            yield child


def _kind(module: nn.Module, name: str) -> tuple[type, str]:
    return type(module), re.sub(r"\d+", "*", name)


def _traced() -> bool:
    return torch.compiler.is_compiling() or torch.jit.is_tracing()
