"""OpenVINO IR in a folder that optimum-intel loads: converted graphs with quantized weights stored as integers.

Linears and convolutions with fake quantizers become i8 (or i4) constants with FakeQuantize on
their inputs, which the CPU plugin turns into integer kernels. Rows of embeddings are int8 with
one scale to a row, as they were in training, or int4 with one scale to every 64 values (the
token embedding of `int8_emb4`). Weights that were compressed in torch keep the
integers and scales they have there (weights.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import nncf
import openvino as ov
from torch import Tensor, nn

from mptrain.compress.quantize import integers, quantizers
from mptrain.compress.quantize.embedding import group_of
from mptrain.compress.structure.scopes import openvino_module
from mptrain.compress.weights import records
from mptrain.core.disk import whole
from mptrain.core.embeddings import name_in, token_embedding
from mptrain.core.errors import ExportError, UserError
from mptrain.core.signature import Signature, probed
from mptrain.core.silence import silenced
from mptrain.export.openvino import half as openvino_fp16
from mptrain.export.openvino import left, weights
from mptrain.export.openvino.convert import convert, number_names, single
from mptrain.export.openvino.runner import CachedIr, CompiledIr, computes_in
from mptrain.export.torch.fits import check_fits
from mptrain.export.torch.token_by_token import check
from mptrain.recipe import Precision
from mptrain.verify import overflow, parity

XML = "openvino_model.xml"  # the name optimum-intel looks for


@dataclass(frozen=True)
class Exported:
    """size_bytes: xml and bin together. half: what of an fp16 export stays in fp32 (`openvino_fp16.described`). left:
    nodes of a quantized one that stay in float because that was asked for (left.py)."""

    folder: Path
    xml: Path
    size_bytes: int
    half: dict[str, Any] | None = None
    left: dict[str, list[str]] | None = None


def export_openvino(
    model: nn.Module,
    example: Mapping[str, Tensor],
    folder: Path,
    *,
    precision: Precision,
    processor: Any = None,
    cache: int | None = None,
    **options: Any,
) -> Exported:
    """Write folder/ with openvino_model.xml and .bin, config.json and the processor's files, as `write` does. options:
    what else that takes."""
    generation = getattr(model, "generation_config", None) if cache is not None else None
    with whole(folder, getattr(model, "config", None), processor, generation) as scratch:
        done = write(model, example, scratch, precision=precision, cache=cache, **options)
    return replace(done, folder=folder, xml=folder / XML)


def write(
    model: nn.Module,
    example: Mapping[str, Tensor],
    folder: Path,
    *,
    precision: Precision,
    embeddings: str = "fp32",
    calibration: Sequence[Mapping[str, Tensor]] = (),
    signature: Signature | None = None,
    cache: int | None = None,
) -> Exported:
    """Write openvino_model.xml and .bin into a folder that exists.

    model: a plain model for "fp32" and "fp16", one with quantizers for "int8" and "int8_emb4", one with
    records for "compressed". It is not changed.
    example: inputs by name, at least 2 examples; fixes the inputs of the IR and their order. signature: says which
    of their axes stay dynamic, and which outputs count; default what running the model tells.
    cache: of a causal LM, the tokens of the longest text: the IR then keeps keys and values (cached.py), and has been
    compared token by token with itself and with the model. None: it reads whole texts.
    embeddings: "fp32" or "int8"; int8_emb4 has an int4 token embedding, and int8 for the others.
    calibration: real inputs, on which "fp16" is checked for overflow; default: the example.
    Raises UserError when precision and model do not fit, ExportError when the conversion fails.
    """
    _check(model, precision)
    signature = probed(model, example) if signature is None else signature
    # no name for the graph here: it holds the weights once more, and is not needed once it is saved
    if precision == "fp16":
        done = _write_fp16(model, example, list(calibration) or [example], folder, signature, cache)
    else:
        graph = _stored(model, example, signature, precision, embeddings, cached=cache is not None)
        asked = quantizers.left_in_float(model) if precision in ("int8", "int8_emb4") else {}
        found = left.left(graph, asked) if any(asked.values()) else None
        done = replace(_save(graph, folder), left=found)
        del graph
    if cache is not None:
        with closing(CachedIr(done.xml, cache)) as runner:
            check(runner, single(model), runtime="OpenVINO", exact=precision in ("fp32", "compressed"))
    return done


def _stored(
    model: nn.Module,
    example: Mapping[str, Tensor],
    signature: Signature,
    precision: Precision,
    embeddings: str,
    *,
    cached: bool,
) -> ov.Model:
    """The graph with its weights as the precision stores them."""
    if precision == "compressed":
        held = records.of(model)
        with weights.computed(model, held):
            graph = convert(model, example, signature, cached=cached)
        weights.store(graph, held)
        return graph
    if precision not in ("int8", "int8_emb4"):
        return convert(model, example, signature, cached=cached)
    token = {_token_embedding(model)} if precision == "int8_emb4" else set()
    kept: Literal["fp32", "int8"] = "int8" if token or embeddings == "int8" else "fp32"
    model, tables = integers.rounded_tables(model, embeddings=kept, leave=token)
    quantizers.freeze(model)  # here, for `convert` would do it to one more copy
    graph = convert(model, example, signature, cached=cached)
    for name in token:
        width = model.get_parameter(f"{name}.weight").shape[1]
        graph = _compress_embeddings(graph, token, bits=4, group=group_of(width, "export precision int8_emb4"))
    known = weights.constants(graph)
    tables = {name: record for name, record in tables.items() if name in known}
    weights.store(graph, tables)
    if kept == "int8":  # one that is tied to a quantized weight, or goes by another name in the graph
        rest = _embeddings(model) - token - {name.removesuffix(".weight") for name in tables}
        graph = _compress_embeddings(graph, rest, bits=8)
    number_names(graph)
    return graph


def _write_fp16(
    model: nn.Module,
    example: Mapping[str, Tensor],
    batches: Sequence[Mapping[str, Tensor]],
    folder: Path,
    signature: Signature,
    cache: int | None,
) -> Exported:
    plain = single(model)
    found, ops = openvino_fp16.find(plain.eval(), batches, signature)
    graph = convert(model, example, signature, cached=cache is not None)
    graph, nodes, constants = openvino_fp16.marked(graph, found.keep, ops)
    facts = openvino_fp16.described(found, nodes, constants)
    done = _save(graph, folder, half=True)
    del graph
    if computes_in("f16"):
        half = CompiledIr(done.xml, precision="f16") if cache is None else CachedIr(done.xml, cache, precision="f16")
        with closing(half) as runner:
            facts["executed"] = overflow.as_json(parity.executed(plain, runner, batches, signature))
        if not facts["executed"]["finite"]:
            raise ExportError(
                "computed in fp16 on this CPU, the exported model gives values that are not finite, although"
                f" {', '.join(found.keep) or 'nothing'} was kept in fp32. Export it as fp32."
            )
    return replace(done, half=facts)


def _check(model: nn.Module, precision: str) -> None:
    if quantizers.is_quantized(model) and precision in ("fp32", "fp16"):
        raise UserError(
            f"export precision {precision} of a model with quantizers: detach them first (quantizers.detach)"
        )
    check_fits(model, precision)


def _embeddings(model: nn.Module) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}


def _token_embedding(model: nn.Module) -> str:
    token = token_embedding(model)
    name = name_in(model, token)
    if name is None or not isinstance(token, nn.Embedding):
        raise UserError(f"export precision int8_emb4: {type(model).__name__} has no token embedding; use int8")
    return name


def _compress_embeddings(graph: ov.Model, modules: set[str], *, bits: int, group: int = -1) -> ov.Model:
    """Store the tables of these embedding modules as integers; nothing else of the graph changes."""
    operations = [node for node in graph.get_ops() if node.get_type_name() != "Constant"]
    tables = [
        node
        for node in operations
        if node.get_type_name() == "Gather" and openvino_module(node.get_friendly_name()) in modules
    ]
    if not tables:
        return graph
    others = [node.get_friendly_name() for node in operations if node not in tables]
    options: dict[str, Any] = {"mode": nncf.CompressWeightsMode.INT8_SYM}
    if bits == 4:
        options = {"mode": nncf.CompressWeightsMode.INT4_SYM, "group_size": group, "all_layers": True}
    with silenced():
        graph = nncf.compress_weights(graph, ignored_scope=nncf.IgnoredScope(names=others, validate=False), **options)
    number_names(graph)
    return graph


def _save(graph: ov.Model, folder: Path, *, half: bool = False) -> Exported:
    xml = folder / XML
    ov.save_model(graph, xml, compress_to_fp16=half)
    return Exported(folder, xml, xml.stat().st_size + xml.with_suffix(".bin").stat().st_size)
