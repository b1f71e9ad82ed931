"""Fake quantizers on a torch model: placing them, saving and restoring, taking them off and on around a shrink.

    quantize(model, config, batches)          calibrated quantizers on a copy
    config_of, attach                         JSON of the quantizers; state_dict() holds their ranges
    detach -> slice_quantizers -> attach      over a boundary where Linears lose rows and columns

A quantized model is the same class with NNCF's hooks around its forward. It trains, copies
and runs under DDP like the plain one. Gradient checkpointing and torch.compile do not work
on it, and layers must run in a fixed order, so layer drop is switched off.
"""

from __future__ import annotations

import copy
import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from mptrain.compress.quantize.fake_quant import FakeQuantizer
from mptrain.compress.quantize.tables import RowQuantizer
from mptrain.compress.structure.scopes import check_operations, is_operation, resolve
from mptrain.compress.structure.shrink import Slices
from mptrain.core.embeddings import token_embedding
from mptrain.core.errors import ModelError, UserError
from mptrain.core.hooks import HOOKS, LEFT, is_quantized
from mptrain.core.progress import progress
from mptrain.core.recurrence import recurrences
from mptrain.core.silence import silenced
from mptrain.recipe import Ptq, Qat
from mptrain.recipe.weights import REDUCED

log = logging.getLogger(__name__)
Model = TypeVar("Model", bound=nn.Module)
VERSION = 1


def quantize(model: Model, config: Qat | Ptq, batches: Sequence[Mapping[str, Tensor]]) -> Model:
    """A copy of the model with calibrated fake quantizers on the weights and inputs of its layers.

    batches: keyword arguments of the model, without labels; moved to its device. The same
    batches give the same ranges. Ranges are trainable. Rows of embeddings are rounded as int8 exports store them (see
    tables.py). The products inside attention have no quantizers (see placement.py), nor have the cells of recurrences:
    NNCF would give some to each step of the first example.
    Raises UserError for a pattern in `ignore` or `bits` that matches nothing it could act on, ModelError for a model
    that NNCF cannot follow.
    """
    nncf_side = _placement()
    check_attention(model)
    if is_quantized(model):
        raise UserError("the model is quantized already: quantize in one stage only, or start from an earlier stage")
    names = [name for name, _ in model.named_modules()]
    patterns = given(config)
    modules = [pattern for pattern in patterns if not is_operation(pattern)]
    asked = resolve(modules, names, "quantize.ignore")
    ignore = asked | _cells(model)
    bits = {pattern: resolve([pattern], names, "quantize.bits") for pattern in config.bits}
    symmetric_activations = (
        config.activations == "symmetric" if isinstance(config, Qat) else config.preset == "performance"
    )
    device = next(model.parameters()).device
    with progress("calibrating quantizers"), silenced():
        quantized = nncf_side.place(
            model,
            [{name: value.to(device) for name, value in batch.items()} for batch in batches],
            symmetric_weights=isinstance(config, Ptq) or config.weights == "symmetric",
            symmetric_activations=symmetric_activations,
            ignore=ignore,
            operations=[pattern for pattern in patterns if is_operation(pattern)],
            smooth=config.smooth_quant,
            correct_bias=isinstance(config, Ptq) and config.fast_bias_correction,
            bits=REDUCED if config.reduce_range else 8,
            transformer=config.scheme == "transformer",
            tables=_tables(model, config),
        )
    if not any(isinstance(module, FakeQuantizer) for module in quantized.modules()):
        raise UserError(f"quantize.ignore: with {config.ignore} nothing is left to quantize; name fewer modules")
    quantized.__dict__[LEFT]["modules"] = [n for n in names if n in asked and n.rpartition(".")[0] not in asked]
    _set_bits(quantized, config.bits, bits)
    if getattr(getattr(quantized, "config", None), "layerdrop", 0):
        quantized.config.layerdrop = 0.0  # hooks count calls: a skipped layer would shift those of the next
    return quantized.train(model.training)


def _cells(model: nn.Module) -> set[str]:
    """The modules inside recurrences, which stay float; a warning says so."""
    found = {f"{name}.cell": module.cell for name, module in recurrences(model).items()}
    if found:
        log.warning("quantize: %s stay float; mode weight_only has integers for their weights", ", ".join(found))
    return {f"{name}.{inner}".rstrip(".") for name, cell in found.items() for inner, _ in cell.named_modules()}


def _tables(model: nn.Module, config: Qat | Ptq) -> set[str]:
    """The embeddings that exports store as int8; one of tokens in int4 is rounded already (embedding.py)."""
    if config.embeddings == "fp32":
        return set()
    token = token_embedding(model) if config.embeddings == "int4" else None
    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding) and module is not token}


def given(config: Qat | Ptq) -> list[str]:
    """The patterns of `ignore`; none where they are sought (restore.py)."""
    return config.ignore if isinstance(config.ignore, list) else []


def check_ignored(config: Qat | Ptq, model: nn.Module) -> None:
    """Raises UserError for a pattern of `ignore` whose module the model does not have; which operations run in a module
    only a forward pass tells."""
    names = [name for name, _ in model.named_modules()]
    resolve([pattern for pattern in given(config) if not is_operation(pattern)], names, "quantize.ignore")
    check_operations([pattern for pattern in given(config) if is_operation(pattern)], names, "quantize.ignore")


def check_attention(model: nn.Module) -> None:
    """Raises ModelError for torch's own attention: NNCF finds no weight behind the parts of a packed projection."""
    packed = [name for name, module in model.named_modules() if isinstance(module, nn.MultiheadAttention)]
    if packed:
        raise ModelError(
            f"{packed[0]} is an nn.MultiheadAttention, whose packed projection cannot have quantizers: replace it by a"
            " module with projections of its own, or compress weights only (quantize.mode: weight_only)."
        )


def config_of(model: nn.Module) -> dict[str, Any]:
    """The quantizers of a model as JSON; `attach` builds them again."""
    entries: list[dict[str, Any]] = []
    for names, module in _placement().hooks(model):
        if isinstance(module, FakeQuantizer):
            entries.append(
                {
                    "kind": "fake_quantizer",
                    "at": names,
                    "bits": module.bits,
                    "symmetric": module.symmetric,
                    "signed": module.signed,
                    "narrow": module.narrow,
                    "shape": list(module.shape),
                    "weight_of": module.weight_of,
                }
            )
        elif isinstance(module, RowQuantizer):
            entries.append({"kind": "rows", "at": names, "table": module.table})
        else:
            entries.append(
                {"kind": "smooth", "at": names, "shape": list(module.scale.shape), "input_of": module.input_of}
            )
    return {"version": VERSION, "modules": entries, "left": left_in_float(model)}


def left_in_float(model: nn.Module) -> dict[str, Any]:
    """What `ignore` asked to stay in float, as `core.hooks.LEFT` says; nothing in models that older versions saved."""
    return model.__dict__.get(LEFT, {"modules": [], "operations": {}})


def attach(model: Model, config: Mapping[str, Any], tensors: Mapping[str, Tensor] | None = None) -> Model:
    """Put the quantizers of `config` on a plain model; changes and returns it.

    Without `tensors` their ranges are placeholders: load_state_dict(strict=True) of the saved
    state comes next. With the tensors of `detach` the model then computes what the model that
    was detached computed.
    Raises ModelError for a config of another version or kind, or tensors that do not fit it.
    """
    nncf_side = _placement()
    if config.get("version") != VERSION:
        raise ModelError(
            f"the quantizer config has version {config.get('version')!r}, this mptrain reads {VERSION};"
            " quantize the model again or use the mptrain version that wrote it"
        )
    device = next(model.parameters()).device
    modules = [(entry["at"], _build(entry, nncf_side).to(device)) for entry in config["modules"]]
    nncf_side.hooked(model, modules).train(model.training)
    if "left" in config:
        model.__dict__[LEFT] = dict(config["left"])
    if tensors is not None:
        try:
            model.get_submodule(HOOKS).load_state_dict(dict(tensors), strict=True)
        except RuntimeError as error:
            raise ModelError(f"the quantizer tensors do not fit the quantizer config: {error}") from None
        for _, module in modules:
            if isinstance(module, nncf_side.Smooth):
                nncf_side.fold(model, module, inverse=True)
    return model


def detach(model: Model) -> tuple[Model, dict[str, Any], dict[str, Tensor]]:
    """(a plain fp32 copy without quantizers, their config, their tensors on the CPU).

    SmoothQuant's factors are folded into the weights of the copy: without rounding it computes
    the same function.
    """
    nncf_side = _placement()
    config = config_of(model)
    tensors = {name: t.detach().cpu().clone() for name, t in model.get_submodule(HOOKS).state_dict().items()}
    plain = copy.deepcopy(model)
    for _, module in nncf_side.hooks(plain):
        if isinstance(module, nncf_side.Smooth):
            nncf_side.fold(plain, module)
    nncf_side.unhook(plain)
    return plain, config, tensors


def plain(model: Model) -> Model:
    """Without quantizers, as `detach` takes them off; a model that has none is returned as it is."""
    return detach(model)[0] if is_quantized(model) else model


def frozen(model: Model) -> Model:
    """A copy as `freeze` makes it; a model that is frozen already, and one without quantizers, is returned as it is."""
    if not any(isinstance(module, FakeQuantizer | RowQuantizer) for module in model.modules()):
        return model
    copied = copy.deepcopy(model)
    freeze(copied)
    return copied


def freeze(model: nn.Module) -> None:
    """To trace, not to train: its quantizers become single operations with constants, its weights and tables are
    rounded. A converter that divides by a scale, where the model multiplies by its inverse, would else round weights in
    the middle between two levels otherwise, and one such weight is in every activation behind it."""
    nncf_side = _placement()
    from mptrain.compress.quantize.integers import round_tables

    round_tables(model)
    _round_weights(model)
    for names, module in nncf_side.hooks(model):
        if isinstance(module, FakeQuantizer):
            constant = module.frozen()
            for name in names:
                model.get_submodule(HOOKS).set_submodule(name, constant)


@torch.no_grad()
def _round_weights(model: nn.Module) -> None:
    """Weights become what their quantizers make of them, which is that once more. One that is also read without its
    quantizer, or through two, stays as it is: those of embeddings and of other layers."""
    read = Counter(id(m.weight) for m in model.modules() if isinstance(getattr(m, "weight", None), Tensor))
    nncf_side = _placement()
    for name, quantizer in nncf_side.of_weights(module for _, module in nncf_side.hooks(model)):
        weight = model.get_parameter(name)
        if read[id(weight)] == 1:
            weight.copy_(quantizer(weight))


def slice_quantizers(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], slices: Slices
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors that fit a model whose weights lost indices (`shrink.slices_of`).

    Per-channel weight ranges lose those of their dimension, SmoothQuant factors the inputs of their Linear; ranges of
    activations stay. The shrunk model then computes what the masked one computed.
    """
    modules: list[dict[str, Any]] = []
    cut = dict(tensors)
    for entry in config["modules"]:
        if entry["kind"] == "rows":  # their scales follow what stays of each row
            modules.append(entry)
            continue
        shape = list(entry["shape"])
        for dim, stays in _stays(entry, slices).items():
            if len(shape) > 1 and shape[dim] > 1:
                for name in entry["at"]:
                    for key in (k for k in cut if k.startswith(f"{name}.")):
                        cut[key] = cut[key].index_select(dim, stays.to("cpu"))
                shape[dim] = len(stays)
        modules.append({**entry, "shape": shape})
    return {**config, "modules": modules}, cut


def _stays(entry: Mapping[str, Any], slices: Slices) -> Mapping[int, Tensor]:
    """What stays of a quantizer's ranges, by their dimension."""
    if entry["kind"] == "smooth":
        inputs = slices.get(f"{entry['input_of']}.weight", {}).get(1)
        return {} if inputs is None else {len(entry["shape"]) - 1: inputs}
    return slices.get(f"{entry['weight_of']}.weight", {})


def _set_bits(model: nn.Module, bits: Mapping[str, int], modules: Mapping[str, set[str]]) -> None:
    weights = {q.weight_of: q for q in model.get_submodule(HOOKS).modules() if isinstance(q, FakeQuantizer)}
    weights.pop(None, None)
    for pattern, names in modules.items():
        found = [weights[name] for name in sorted(names) if name in weights]
        if not found:
            raise UserError(
                f"quantize.bits: {pattern!r} matches no layer with a quantized weight. Name a Linear or"
                " convolution that quantize.ignore leaves in; an int4 embedding is export precision int8_emb4"
            )
        for quantizer in found:
            quantizer.bits = bits[pattern]


def _build(entry: Mapping[str, Any], nncf_side: Any) -> nn.Module:
    if entry["kind"] == "smooth":
        return nncf_side.Smooth(torch.ones(entry["shape"]), entry["input_of"])
    if entry["kind"] == "fake_quantizer":
        options = ("bits", "symmetric", "signed", "narrow", "weight_of")
        return FakeQuantizer(shape=tuple(entry["shape"]), **{option: entry[option] for option in options})
    if entry["kind"] == "rows":
        return RowQuantizer(entry["table"])
    raise ModelError(f"the quantizer config has a module of kind {entry['kind']!r}, not fake_quantizer, rows or smooth")


def check_installed() -> None:
    """Raises UserError without NNCF, which is an extra: models that are not quantized run without it."""
    if find_spec("nncf") is None:
        raise UserError("quantization needs nncf: pip install 'mptrain[openvino]'")


def _placement() -> Any:
    check_installed()
    from mptrain.compress.quantize import placement

    return placement
