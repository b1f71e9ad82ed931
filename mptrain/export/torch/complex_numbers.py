"""Complex numbers of a model's code as pairs of real tensors, for targets that have no type for them.

Rotary embeddings are often written as a product of complex numbers. While such a model is traced or exported, each
complex tensor is a `Pair` of its real and imaginary part, and operations on it are written out:

    (a + bi)(c + di) = (ac - bd) + (ad + bc)i        polar(r, φ) = r cos φ + i r sin φ        e^(a + bi) = polar(e^a, b)
    view_as_complex(x) = x[..., 0] + i x[..., 1]     what moves values, moves both parts

An operation that is not in the tables has no such form here: the export is refused, and all of them are named.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from mptrain.core.errors import ExportError
from mptrain.core.signature import without_cache

_REAL = {torch.complex32: torch.float16, torch.complex64: torch.float32, torch.complex128: torch.float64}
_COMPLEX = {real: kind for kind, real in _REAL.items()}
_MOVES = frozenset(
    "view reshape unsqueeze squeeze transpose permute getitem expand expand_as contiguous flatten unflatten narrow"
    " select repeat repeat_interleave tile clone detach index_select gather chunk split unbind movedim swapaxes roll"
    " flip broadcast_to to cpu type cat stack concat where neg".split()
)
"""names of functions that do to a complex tensor what they do to both of its parts"""
_ASKS = frozenset("size dim numel element_size is_complex is_floating_point stride is_contiguous len".split())
"""names of functions that ask for what is no value"""


class Pair:
    """real, imag: of one shape. Stands for a complex tensor in the code of a model."""

    def __init__(self, real: Tensor, imag: Tensor) -> None:
        self.real, self.imag = real, imag

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return _computed(func, args, dict(kwargs or {}), _refuse)

    @property
    def dtype(self) -> torch.dtype:
        return _COMPLEX[self.real.dtype]

    @property
    def T(self) -> Pair:
        return Pair(self.real.T, self.imag.T)

    def __getattr__(self, name: str) -> Any:
        if name in ("shape", "device", "ndim", "requires_grad", "layout"):
            return getattr(self.real, name)
        method = getattr(Tensor, name, None)
        if not callable(method) or (name.startswith("__") and name.endswith("__")):
            raise AttributeError(name)
        return lambda *args, **kwargs: self.__torch_function__(method, (), (self, *args), kwargs)

    def __len__(self) -> int:
        return len(self.real)

    @property
    def whole(self) -> Tensor:
        return torch.complex(self.real, self.imag)


def _operator(name: str) -> Callable[..., Any]:
    def of_pair(self: Pair, *args: Any) -> Any:
        return self.__torch_function__(getattr(Tensor, name), (), (self, *args))

    return of_pair


for operator in "mul rmul add radd sub rsub truediv rtruediv pow neg getitem matmul rmatmul abs eq".split():
    setattr(Pair, f"__{operator}__", _operator(f"__{operator}__"))


class RealArithmetic(TorchFunctionMode):
    """For the length of a `with` block. unknown: gets the names of functions that have no real form, which are then
    computed with complex numbers; None: they raise ExportError."""

    def __init__(self, unknown: dict[str, None] | None = None) -> None:
        super().__init__()
        self.used, self._unknown = False, unknown

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if _name(func) in _MAKERS or any(map(_is_complex, tree_leaves((args, given)))):
            self.used = True
            return _computed(func, args, given, _refuse if self._unknown is None else self._natively)
        result = func(*args, **given)
        if any(map(_is_complex, tree_leaves(result))):  # made of real numbers, as Fourier transforms make them
            self.used = True
            return result if self._unknown is None else self._natively(func, args, given)
        return result

    def _natively(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        assert self._unknown is not None
        self._unknown[_name(func)] = None
        args, kwargs = tree_map(lambda value: value.whole if isinstance(value, Pair) else value, (args, kwargs))
        return func(*args, **kwargs)


def check_real_form(model: nn.Module, run: Callable[[], Any]) -> bool:
    """Whether the model computes with complex numbers. run: a forward of it. Raises ExportError, that lists every
    operation on them without a real form."""
    unknown: dict[str, None] = {}
    with torch.no_grad(), without_cache(model), RealArithmetic(unknown) as mode:
        run()
    if unknown:
        raise ExportError(
            f"{type(model).__name__} computes with complex numbers, which no target has a type for; what it does with"
            f" them is written out in real arithmetic, but not {', '.join(unknown)}. Write these with cos and sin."
        )
    return mode.used


@contextmanager
def real_arithmetic(model: nn.Module, run: Callable[[], Any]) -> Iterator[None]:
    """Within it, the model's complex numbers are pairs of real ones; nothing changes for a model that has none.

    run: a forward of the model on an example, that shows what it computes. Raises ExportError, that lists every
    operation on complex numbers without a real form.
    """
    if not check_real_form(model, run):
        yield
        return
    kept = list(_split(model))
    try:
        with RealArithmetic():
            yield
    finally:
        for module, place, name, value in kept:
            vars(module).pop(name, None)
            place[name] = value


def _split(model: nn.Module) -> Iterator[tuple[nn.Module, dict[str, Any], str, Tensor]]:
    """Replace complex buffers and attributes by pairs; gives what to put back."""
    for module in model.modules():
        for place in (module._buffers, vars(module)):
            for name, value in list(place.items()):
                if isinstance(value, Tensor) and value.is_complex():
                    del place[name]
                    vars(module)[name] = Pair(value.real.contiguous(), value.imag.contiguous())
                    yield module, place, name, value


def _refuse(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    raise ExportError(
        f"the model computes {_name(func)} of complex numbers, which no target has a type for and which has no form in"
        " real arithmetic here. Write it with cos and sin."
    )


def _is_complex(value: Any) -> bool:
    return isinstance(value, (Pair, complex)) or (isinstance(value, Tensor) and value.is_complex())


def _name(func: Any) -> str:
    """Of a function, method or operator of torch, without underscores: "mul" of all kinds of products."""
    name = getattr(func, "__name__", str(func))
    if name == "__get__":  # of a property
        name = getattr(getattr(func, "__self__", None), "__name__", name)
    return name.strip("_")


def _pair(value: Any) -> Any:
    if isinstance(value, Tensor) and value.is_complex():
        return Pair(value.real, value.imag)
    return value


def _parts(value: Any) -> tuple[Any, Any]:
    """Real and imaginary part of a pair, a real tensor or a number."""
    if isinstance(value, (Pair, complex)):
        return value.real, value.imag
    return value, 0


def _computed(func: Any, args: tuple, kwargs: dict[str, Any], otherwise: Callable[..., Any]) -> Any:
    name = _name(func)
    if name in _ASKS or (
        isinstance(args[0], Tensor) and getattr(func, "__name__", "") == "__get__" and name not in _OF
    ):
        return func(*(a.real if isinstance(a, Pair) else a for a in args), **kwargs) if name != "is_complex" else True
    args, kwargs = tree_map(_pair, (args, kwargs))
    if name in _OF:
        return _OF[name](*args, **kwargs)
    if name in _MOVES:
        return _moved(func, args, kwargs)
    return otherwise(func, args, kwargs)


def _moved(func: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    def part(which: str) -> Any:
        def of(value: Any) -> Any:
            if isinstance(value, torch.dtype):
                return _REAL.get(value, value)
            return getattr(value, which) if isinstance(value, Pair) else value

        taken, named = tree_map(of, (args, kwargs))
        return func(*taken, **named)

    real, imag = part("real"), part("imag")
    if isinstance(real, (tuple, list)):
        return type(real)(map(Pair, real, imag)) if type(real) in (tuple, list) else tuple(map(Pair, real, imag))
    return Pair(real, imag)


def _product(x: Any, y: Any) -> Pair:
    (a, b), (c, d) = _parts(x), _parts(y)
    if not isinstance(y, (Pair, complex)):
        return Pair(a * c, b * c)
    if not isinstance(x, (Pair, complex)):
        return Pair(a * c, a * d)
    return Pair(a * c - b * d, a * d + b * c)


def _sum(x: Any, y: Any, sign: int = 1) -> Pair:
    (a, b), (c, d) = _parts(x), _parts(y)
    real = a + c if sign == 1 else a - c
    imag = b + d if sign == 1 else b - d
    return Pair(real, imag if isinstance(imag, Tensor) and imag.shape == real.shape else imag + torch.zeros_like(real))


def _quotient(x: Any, y: Any) -> Pair:
    if not isinstance(y, (Pair, complex)):
        return Pair(x.real / y, x.imag / y)
    c, d = _parts(y)
    found = _product(x, Pair(c, -d) if isinstance(y, Pair) else y.conjugate())
    size = c * c + d * d
    return Pair(found.real / size, found.imag / size)


def _polar(size: Tensor, angle: Tensor) -> Pair:
    return Pair(size * angle.cos(), size * angle.sin())


_MAKERS = frozenset({"view_as_complex", "polar", "complex"})
_OF: dict[str, Callable[..., Any]] = {
    "view_as_complex": lambda x: Pair(x[..., 0], x[..., 1]),
    "polar": _polar,
    "complex": Pair,
    "view_as_real": lambda x: torch.stack([x.real, x.imag], -1),
    "mul": _product,
    "multiply": _product,
    "rmul": _product,
    "add": _sum,
    "radd": _sum,
    "sub": lambda x, y: _sum(x, y, -1),
    "rsub": lambda x, y: _sum(y, x, -1),
    "div": _quotient,
    "truediv": _quotient,
    "conj": lambda x: Pair(x.real, -x.imag),
    "resolve_conj": lambda x: x,
    "exp": lambda x: _polar(x.real.exp(), x.imag),
    "abs": lambda x: (x.real.square() + x.imag.square()).sqrt(),
    "angle": lambda x: torch.atan2(x.imag, x.real),
    "real": lambda x: x.real,
    "imag": lambda x: x.imag,
}
"""by name, of pairs, real tensors and numbers"""
