"""Where fake quantizers go and which ranges they start with, by nncf.quantize; everything that touches NNCF's hooks.

NNCF places quantizers (its rules for transformers), calibrates them, and may smooth
activations and correct biases. Its quantizer modules are then replaced by ours, in its hook
storage, under its names: `pre_hooks.<operation>__<input>.<n>`. SmoothQuant's factor and the
quantizer after it become entries 0 and 1 of one input.

Attention's own products are left alone: OpenVINO runs attention as one fused kernel only while
it is not quantized. So are embeddings by NNCF, which would give a whole table one scale: their
rows have one each, as the export stores them (tables.py).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import nncf
import torch
from nncf.common.quantization.structs import QuantizationScheme
from nncf.quantization.advanced_parameters import AdvancedSmoothQuantParameters, OverflowFix, QuantizationParameters
from nncf.quantization.algorithms.smooth_quant.algorithm import SmoothQuant
from nncf.tensor import Tensor as NncfTensor
from nncf.torch.extensions import ExtensionNamespace
from nncf.torch.function_hook.wrapper import get_hook_storage, wrap_model
from nncf.torch.quantization import extensions
from nncf.torch.quantization.layers import AsymmetricQuantizer, SQMultiply, SymmetricQuantizer
from nncf.torch.quantization.reference import torch_executor
from torch import Tensor, nn
from torch.nn.utils import parametrize

from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.quantize.operations import Record, recorded
from mptrain.compress.quantize.tables import RowQuantizer
from mptrain.compress.structure.scopes import resolve_operations
from mptrain.compress.weights.layers import is_transposed
from mptrain.core.hooks import HOOKS, LEFT
from mptrain.core.patch import replaced

_ATTENTION = ["scaled_dot_product_attention", "matmul", "bmm", "baddbmm"]
_EMBEDDING = ["embedding"]
_SMOOTH_ALPHA = 0.95  # NNCF's for transformers


class Smooth(nn.Module):
    """SmoothQuant's factor on the input of a Linear, whose weight holds the inverse (Xiao et al. 2022).

    The factors are powers of two, so moving them into the weight and back changes no bit.
    scale: [1, …, in_features]. input_of: name of the Linear.
    """

    scale: Tensor

    def __init__(self, scale: Tensor, input_of: str):
        super().__init__()
        self.input_of = input_of
        self.register_buffer("scale", scale)

    def forward(self, x: Tensor) -> Tensor:
        return x * self.scale


class Alias(nn.Module):
    """A quantizer used at a second place; it owns nothing, so no tensor is saved twice."""

    quantizer: nn.Module

    def __init__(self, quantizer: nn.Module):
        super().__init__()
        self.__dict__["quantizer"] = quantizer  # not a submodule

    def forward(self, x: Tensor) -> Tensor:
        return self.quantizer(x)


def place(
    model: nn.Module,
    batches: Sequence[Mapping[str, Tensor]],
    *,
    symmetric_weights: bool,
    symmetric_activations: bool,
    ignore: set[str],
    operations: Sequence[str] = (),
    smooth: bool,
    correct_bias: bool,
    bits: int,
    transformer: bool = True,
    tables: Collection[str] = (),
) -> nn.Module:
    """A hooked copy of the model with calibrated FakeQuantizer and Smooth modules, and RowQuantizer.

    batches: keyword arguments of the model, on its device. ignore: names of modules to leave in fp32. operations:
    patterns of single ones (`scopes.resolve_operations`). bits: of weights. tables: names of embeddings whose rows are
    rounded; one that shares a quantized weight is not.
    """
    ignore = ignore | {name for name, module in model.named_modules() if parametrize.is_parametrized(module)}
    plain = recorded(model, batches[0])
    scopes = resolve_operations(operations, list(plain.scopes.values()), "quantize.ignore")
    skipped = [op for op, module in plain.modules.items() if module in ignore or plain.scopes.get(op) in scopes]
    modes = {True: QuantizationScheme.SYMMETRIC, False: QuantizationScheme.ASYMMETRIC}
    with _reference_kernels(), _powers_of_two():
        quantized = nncf.quantize(
            model,
            nncf.Dataset(batches),
            subset_size=len(batches),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
            ignored_scope=nncf.IgnoredScope(names=skipped, types=_ATTENTION + _EMBEDDING, validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                weights_quantization_params=QuantizationParameters(mode=modes[symmetric_weights]),
                activations_quantization_params=QuantizationParameters(mode=modes[symmetric_activations]),
                smooth_quant_alphas=AdvancedSmoothQuantParameters(
                    convolution=-1, matmul=_SMOOTH_ALPHA if smooth else -1
                ),
                disable_bias_correction=not correct_bias,
                overflow_fix=_overflow_fix(bits, symmetric_weights),
            ),
        )
        record = recorded(quantized, batches[0])
    _replace_quantizers(quantized, record, tables)
    calls = Counter(scope.rpartition("/")[0] for scope in plain.scopes.values())
    quantized.__dict__[LEFT] = {
        "modules": [],
        "operations": {scope: calls[scope.rpartition("/")[0]] for scope in plain.scopes.values() if scope in scopes},
    }
    if bits < 8:
        _reduce(quantized, bits)
    return quantized


def _overflow_fix(bits: int, symmetric: bool) -> OverflowFix | None:
    """NNCF's own way to 7 bits, which only symmetric weights have: 8, and twice the scale. None: its default, which
    leaves a bit of the first convolution unused. So it corrects biases for what the weights become."""
    return None if bits == 8 else OverflowFix.ENABLE if symmetric else OverflowFix.DISABLE


@torch.no_grad()
def _reduce(model: nn.Module, bits: int) -> None:
    """Weights of so many bits, in which the scales are those of their values again: they stay so in training."""
    for _, quantizer in of_weights(module for _, module in hooks(model)):
        quantizer.bits = bits
        if quantizer.symmetric:
            quantizer.scale.div_(2)


def hooked(model: nn.Module, modules: Iterable[tuple[Sequence[str], nn.Module]]) -> nn.Module:
    """Put each module at its hook names; changes and returns the model."""
    model = wrap_model(model)
    _leave_inputs_alone(model)
    at: dict[str, nn.Module] = {}
    for (first, *others), module in modules:
        at |= {first: module} | {name: Alias(module) for name in others}
    for name in sorted(at):  # hooks of one input run in the order they were put in
        get_hook_storage(model).insert_hook_by_name(name, at[name])
    return model


def _leave_inputs_alone(model: nn.Module) -> None:
    """Audio encoders demand a gradient of their input in training, which fails on the output of a quantizer.

    They do it for gradient checkpointing alone, which quantizers rule out.
    """
    for module in model.modules():
        if getattr(module, "_requires_grad", False) is True:
            module.__dict__["_requires_grad"] = False


def unhook(model: nn.Module) -> None:
    """Make the model a plain one again."""
    model.__dict__.pop(LEFT, None)
    del model._modules[HOOKS]
    for attribute in ("forward", "_replicate_for_data_parallel"):
        del model.__dict__[attribute]


def hooks(model: nn.Module) -> list[tuple[list[str], nn.Module]]:
    """Every module in the hooks with the names it is at, the owner first, in a fixed order."""
    found: dict[int, tuple[list[str], nn.Module]] = {}
    placed = sorted(get_hook_storage(model).named_hooks(), key=lambda entry: (isinstance(entry[1], Alias), entry[0]))
    for name, module in placed:
        owner: nn.Module = module.quantizer if isinstance(module, Alias) else module
        found.setdefault(id(owner), ([], owner))[0].append(name)
    return list(found.values())


def of_weights(modules: Iterable[nn.Module]) -> Iterator[tuple[str, FakeQuantizer]]:
    """Those of hook modules that round a weight, with its name."""
    for module in modules:
        if isinstance(module, FakeQuantizer) and module.weight_of is not None:
            yield f"{module.weight_of}.weight", module


def _replace_quantizers(model: nn.Module, record: Record, tables: Collection[str]) -> None:
    """Ours for NNCF's, SmoothQuant's factor beside its quantizer, one quantizer for operations that read one tensor.
    And those of rows."""
    linear_of = {module: op for op, module in record.modules.items() if op.split("/")[-2] == "linear"}
    ours: dict[Any, tuple[list[str], nn.Module]] = {}
    factors: dict[str, Smooth] = {}
    for name, module in get_hook_storage(model).named_hooks(remove_duplicate=False):
        kind, operation, port = decoded(name)
        if isinstance(module, SQMultiply):
            owner = record.modules[operation]
            factors[owner] = Smooth(module.scale.detach().clone(), owner)
            continue
        if kind == "post_hooks" and "/pre_hook__" in operation:  # behind a factor
            operation = linear_of[record.modules[operation]]
            kind, port, name = "pre_hooks", 0, f"pre_hooks.{operation}__0.1"
        weight_of = record.modules[operation] if kind == "pre_hooks" else None
        # linear(x, weight), but addmm(bias, x, weight) in a Conv1D
        if weight_of is not None and port != 1 + is_transposed(model.get_submodule(weight_of)):
            weight_of = None
        key: Any = id(module)
        if kind == "pre_hooks" and port == 0:
            key = (id(record.inputs[operation]), module.num_bits, type(module))
        ours.setdefault(key, ([], _ours(module, weight_of)))[0].append(name)
    unhook(model)
    quantized = {module.weight_of for _, module in ours.values()}
    for owner, factor in factors.items():
        if owner in quantized:
            ours[owner] = ([f"pre_hooks.{linear_of[owner]}__0.0"], factor)
        else:  # NNCF smooths ignored layers as well
            fold(model, factor)
    hooked(model, [*ours.values(), *_of_rows(model, record, tables, ours.values())])


def _of_rows(
    model: nn.Module, record: Record, tables: Collection[str], others: Collection[tuple[list[str], nn.Module]]
) -> list[tuple[list[str], nn.Module]]:
    """RowQuantizers of these embeddings, before whatever else stands behind them (others, whose names move up)."""
    shared = {id(model.get_parameter(name)) for name, _ in of_weights(module for _, module in others)}
    found: dict[str, list[str]] = {}
    for operation, module in record.modules.items():
        if module not in tables or operation.split("/")[-2] not in _EMBEDDING:
            continue
        if id(model.get_parameter(f"{module}.weight")) in shared:
            continue
        place = f"post_hooks.{operation.replace('.', ':')}__0"
        for names, _ in others:
            names[:] = [f"{place}.1" if name == f"{place}.0" else name for name in names]
        found.setdefault(module, []).append(f"{place}.0")
    return [(names, RowQuantizer(table)) for table, names in found.items()]


@torch.no_grad()
def fold(model: nn.Module, smooth: Smooth, *, inverse: bool = False) -> None:
    """Move SmoothQuant's factor into the weight that holds its inverse, or out of it; exact."""
    weight = model.get_parameter(f"{smooth.input_of}.weight")
    factor = smooth.scale.reshape(1, -1)
    weight.mul_(1 / factor if inverse else factor)


def decoded(name: str) -> tuple[str, str, int]:
    kind, rest = name.split(".", 1)
    operation, port = rest.rsplit(".", 1)[0].rsplit("__", 1)
    return kind, operation.replace(":", "."), int(port)


@torch.no_grad()
def _ours(module: nn.Module, weight_of: str | None) -> FakeQuantizer:
    if not isinstance(module, (SymmetricQuantizer, AsymmetricQuantizer)):
        raise TypeError(f"nncf.quantize placed a {type(module).__name__}, which is not a quantizer mptrain knows")
    symmetric = isinstance(module, SymmetricQuantizer)
    ours = FakeQuantizer(
        bits=module.num_bits,
        symmetric=symmetric,
        signed=module.signed if symmetric else False,
        narrow=module.narrow_range,
        shape=tuple(module.scale_shape),
        weight_of=weight_of,
    )
    if symmetric:
        ours.scale.data = module.scale.detach().clone()
    else:
        ours.low.data = module.input_low.detach().clone()
        ours.range.data = module.input_range.detach().clone()
    return ours


@contextmanager
def _reference_kernels() -> Iterator[None]:
    """NNCF would compile its C++ kernels, a minute and a toolchain, to correct biases; its torch reference does."""
    reference = SimpleNamespace(Quantize_forward=torch_executor.forward)
    both = (extensions.QuantizedFunctionsCPU, extensions.QuantizedFunctionsCUDA)
    spaces = [space for space in both if isinstance(space, ExtensionNamespace)]
    saved = [space._loaded_namespace for space in spaces]
    try:
        for space in spaces:
            space._loaded_namespace = reference
        yield
    finally:
        for space, namespace in zip(spaces, saved):
            space._loaded_namespace = namespace


@contextmanager
def _powers_of_two() -> Iterator[None]:
    original = SmoothQuant._calculate_scale_and_ratio

    def rounded(*args: Any, **kwargs: Any) -> Any:
        scales, ratio = original(*args, **kwargs)
        return NncfTensor(torch.exp2(torch.log2(scales.data).round())), ratio

    with replaced(SmoothQuant, _calculate_scale_and_ratio=staticmethod(rounded)):
        yield
