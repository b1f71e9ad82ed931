"""Arguments of operations that a converter does not read, rewritten or refused before anything is converted.

After `run_decompositions` an operation's arguments stand in its node: those that are keywords only in torch as
keywords, the others by place. A converter's handler reads some of them, and what it does not read it takes to be at
its default, without a word: `add(x, y, alpha=2)` becomes x + y.

    decompositions   what a handler may not read is written out: alpha as a product, rms_norm as x·rsqrt(mean(x²) + eps)
    check            of what is left, keywords must be at their defaults or known to be read

A table of decompositions serves every exporter of exported graphs; what each one reads is its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from mptrain.core.errors import ExportError

aten: Any = torch.ops.aten

ANYWHERE = frozenset(
    "dtype layout device pin_memory memory_format non_blocking generator requires_grad sparse_grad output_size path"
    " implicit".split()
)
"""keywords that do not change the values of an inference, or that every handler derives from the result's own type"""


def decompositions() -> dict[Any, Callable[..., Any]]:
    """For `ExportedProgram.run_decompositions`: of operations at their defaults nothing changes."""
    return {
        aten.add.Tensor: _add,
        aten.add.Scalar: _add,
        aten.sub.Tensor: _sub,
        aten.sub.Scalar: _sub,
        aten.rsub.Tensor: _rsub,
        aten.rsub.Scalar: _rsub,
        aten.addmm.default: _addmm,
        aten.baddbmm.default: _addmm,
        aten.addbmm.default: _addbmm,
        aten.addmv.default: _addmv,
        aten.addr.default: _addr,
        aten.addcmul.default: _addcmul,
        aten.addcdiv.default: _addcdiv,
        aten.index_add.default: _index_add,
        aten.round.decimals: _round,
        aten.softplus.default: _softplus,
        aten.var.correction: _var,
        aten.std.correction: _std,
        aten.var_mean.correction: _var_mean,
        aten.rms_norm.default: rms_norm,
    }


def check(
    program: ExportedProgram,
    format: str,
    read: Mapping[str, Collection[str]] | None,
    ignored: Mapping[str, Collection[str]],
) -> None:
    """Raises ExportError that names the operations with an argument that the converter does not read.

    format: named in the message. read: by operation ("gelu", all its overloads), the keywords that its handler reads;
    None where all are read. ignored: by operation, the arguments that its handler does not read, or cannot convert.
    """
    found: dict[str, None] = {}
    for module in program.graph_module.modules():
        for node in module.graph.nodes if isinstance(module, torch.fx.GraphModule) else ():
            schema = getattr(node.target, "_schema", None)
            if node.op != "call_function" or schema is None:
                continue
            kind = schema.name.partition("::")[2]
            left_out = ignored.get(kind, ())
            known = ANYWHERE.union(node.kwargs if read is None else read.get(kind, ())).difference(left_out)
            given = {a.name: value for a, value in zip(schema.arguments, node.args) if a.name in left_out}
            given |= {name: value for name, value in node.kwargs.items() if name not in known}
            defaults = {argument.name: argument.default_value for argument in schema.arguments}
            found |= {f"{kind}({name}={value})": None for name, value in given.items()
                      if not _same(value, defaults.get(name))}  # fmt: skip
    if found:
        raise ExportError(
            f"{format} export: the converter does not read these arguments of the model's operations and would compute"
            f" something else: {', '.join(found)}. Write them out with other operations, or use another format."
        )


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, torch.fx.Node):
        return False
    return value is None or bool(value == default)  # None is what a handler that looks for the keyword finds without


def _scaled(value: Any, factor: Any) -> Any:
    return value if factor == 1 else value * factor


def _add(x: Any, y: Any, alpha: Any = 1) -> Any:
    return NotImplemented if alpha == 1 else x + y * alpha


def _sub(x: Any, y: Any, alpha: Any = 1) -> Any:
    return NotImplemented if alpha == 1 else x - y * alpha


def _rsub(x: Any, y: Any, alpha: Any = 1) -> Any:
    return NotImplemented if alpha == 1 else y - x * alpha


def _addmm(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    """Of batches of matrices too."""
    return NotImplemented if alpha == beta == 1 else _blend(x, a @ b, beta, alpha)


def _addbmm(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _blend(x, (a @ b).sum(0), beta, alpha)


def _addmv(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _blend(x, (a @ b[:, None])[:, 0], beta, alpha)


def _addr(x: Tensor, a: Tensor, b: Tensor, *, beta: Any = 1, alpha: Any = 1) -> Any:
    return _blend(x, a[:, None] * b, beta, alpha)


def _blend(x: Tensor, product: Tensor, beta: Any, alpha: Any) -> Tensor:
    """beta·x + alpha·product; x does not count at all where beta is 0."""
    made = _scaled(product, alpha)
    return made if beta == 0 else _scaled(x, beta) + made


def _addcmul(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Any:
    return x + _scaled(a * b, value)


def _addcdiv(x: Tensor, a: Tensor, b: Tensor, *, value: Any = 1) -> Any:
    return x + _scaled(a / b, value)


def _index_add(x: Tensor, axis: int, index: Tensor, source: Tensor, *, alpha: Any = 1) -> Any:
    return NotImplemented if alpha == 1 else torch.index_add(x, axis, index, source * alpha)


def _round(x: Tensor, *, decimals: int) -> Tensor:
    scale = 10.0 ** abs(decimals)
    return torch.round(x * scale) / scale if decimals > 0 else torch.round(x / scale) * scale


def _softplus(x: Tensor, beta: Any = 1, threshold: Any = 20) -> Any:
    """log(1 + exp(beta·x)) / beta, x above the threshold; from 20 on there is no difference in fp32."""
    if beta == 1 and threshold >= 20:
        return NotImplemented
    smooth = torch.nn.functional.softplus(_scaled(x, beta))
    smooth = smooth if beta == 1 else smooth / beta
    return smooth if threshold >= 20 else torch.where(_scaled(x, beta) > threshold, x, smooth)


def _var(x: Tensor, axes: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    """Of all values."""
    every = list(range(x.dim()))
    return NotImplemented if axes else torch.var(x, every, correction=_or_one(correction), keepdim=keepdim)


def _std(x: Tensor, axes: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Any:
    """Of all values."""
    every = list(range(x.dim()))
    return NotImplemented if axes else torch.std(x, every, correction=_or_one(correction), keepdim=keepdim)


def _or_one(correction: Any) -> Any:
    return 1 if correction is None else correction


def _var_mean(
    x: Tensor, axes: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False
) -> tuple[Tensor, Tensor]:
    axes = list(axes) if axes else list(range(x.dim()))
    return torch.var(x, axes, correction=_or_one(correction), keepdim=keepdim), torch.mean(x, axes, keepdim)


def rms_norm(x: Tensor, shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    """x·rsqrt(mean(x²) + eps); eps None is the type's own, as in torch."""
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    made = x * torch.rsqrt(torch.mean(x * x, list(range(-len(shape), 0)), True) + eps)
    return made if weight is None else made * weight


# -- of operations that some converters take for others


def gelu(x: Tensor, *, approximate: str = "none") -> Any:
    """For converters that know the exact one alone; coremltools makes one operation of the pattern again."""
    if approximate == "none":
        return NotImplemented
    return (x * 0.5) * (torch.tanh((torch.pow(x, 3) * 0.044715 + x) * math.sqrt(2.0 / math.pi)) + 1.0)


def clamp(x: Tensor, low: Tensor | None = None, high: Tensor | None = None) -> Tensor:
    """Of tensors; the upper bound is the stronger one."""
    x = x if low is None else torch.maximum(x, low)
    return x if high is None else torch.minimum(x, high)


def diagonal(x: Tensor, offset: int = 0, first: int = 0, second: int = 1) -> Tensor:
    """Every (columns + 1)th value of the flattened matrices."""
    x = x.movedim((first, second), (-2, -1))
    rows, columns = x.shape[-2:]
    start, count = (
        (offset, min(rows, columns - offset)) if offset >= 0 else (-offset * columns, min(rows + offset, columns))
    )
    return x.flatten(-2)[..., start : start + count * (columns + 1) : columns + 1][..., :count]


def avg_pool2d(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """For converters that count the padding: the sum of each window over the values in it."""
    if count_include_pad or ceil_mode or divisor_override is not None or not any(padding):
        return NotImplemented
    pool: Any = torch.nn.functional.avg_pool2d
    return pool(x, kernel, stride or None, padding) / pool(torch.ones_like(x[:1, :1]), kernel, stride or None, padding)


def var(x: Tensor, axes: Sequence[int] | None = None, *, correction: Any = None, keepdim: bool = False) -> Tensor:
    """Σ(x - mean)² / (n - correction), for converters without it."""
    axes = list(axes) if axes else list(range(x.dim()))
    count = math.prod(x.shape[axis] for axis in axes)
    made = torch.mean(torch.square(x - torch.mean(x, axes, True)), axes, keepdim)
    correction = _or_one(correction)
    return made if correction == 0 else made * (count / (count - correction))


def reciprocal(x: Tensor) -> Any:
    """For converters that compute 1 / (x + 1e-4)."""
    return NotImplemented if not x.is_floating_point() else torch.ones_like(x) / x


def scalar_tensor(value: Any, *, dtype: torch.dtype | None = None, **_: Any) -> Any:
    """For converters that round a number to a half first; sizes stay as they are."""
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return NotImplemented
    return torch.full((), value, dtype=dtype or torch.get_default_dtype())


def upsample_nearest2d(x: Tensor, size: Sequence[int] | None, scales: Sequence[float] | None) -> Any:
    """For converters that repeat rows and columns: those that torch takes, where the sizes do not divide."""
    made = [int(n * s) for n, s in zip(x.shape[2:], scales)] if size is None else list(size)  # type: ignore[arg-type]
    if all(isinstance(n, int) and m % n == 0 for n, m in zip(x.shape[2:], made)):
        return NotImplemented
    for axis, count in enumerate(made):
        ratio = x.shape[2 + axis] / count if scales is None else 1 / scales[axis]
        places = torch.floor(torch.arange(count, dtype=torch.float32) * ratio).to(torch.long)
        x = torch.index_select(x, 2 + axis, places)
    return x
