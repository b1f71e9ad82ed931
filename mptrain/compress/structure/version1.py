"""Models that were shrunk before structures were data: a table of the families of that time, kept to load them.

Their config.json says how many heads and channels each layer has:

    {"version": 1, "family": "bert", "layers": {"0": {"heads": 3, "ffn": 512}, …}}

and the table where these are. Nothing that is written now has it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from mptrain.compress.structure import attributes
from mptrain.compress.structure.blocks import Block, short
from mptrain.compress.structure.by_hand import block
from mptrain.core.errors import ModelError


@dataclass(frozen=True)
class Family:
    """Where the parts of a layer are, as attribute paths relative to the layer module."""

    name: str
    layers: tuple[str, ...]  # class names of the layer modules
    attention: str  # the module that knows the size of a head
    head_dim: str  # its attribute with that size
    q: str
    k: str
    v: str
    o: str
    fc_in: tuple[str, ...]
    fc_out: str
    heads: str | None = None  # attribute of `attention` with the number of heads
    width: str | None = None  # the same for heads * head_dim
    bias_table: str | None = None  # parameter of `attention` with one column per head


_BERT = Family(
    name="bert",
    layers=("BertLayer",),
    attention="attention.self",
    head_dim="attention_head_size",
    q="attention.self.query",
    k="attention.self.key",
    v="attention.self.value",
    o="attention.output.dense",
    fc_in=("intermediate.dense",),
    fc_out="output.dense",
    heads="num_attention_heads",
    width="all_head_size",
)
_LLAMA = Family(
    name="llama",
    layers=("LlamaDecoderLayer",),
    attention="self_attn",
    head_dim="head_dim",
    q="self_attn.q_proj",
    k="self_attn.k_proj",
    v="self_attn.v_proj",
    o="self_attn.o_proj",
    fc_in=("mlp.gate_proj", "mlp.up_proj"),
    fc_out="mlp.down_proj",
)

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        _BERT,
        replace(_BERT, name="roberta", layers=("RobertaLayer", "XLMRobertaLayer", "CamembertLayer")),
        replace(_BERT, name="swin", layers=("SwinLayer",), bias_table="relative_position_bias_table"),
        replace(
            _BERT,
            name="vit",
            layers=("ViTLayer", "DeiTLayer"),
            attention="attention.attention",
            q="attention.attention.query",
            k="attention.attention.key",
            v="attention.attention.value",
        ),
        Family(
            name="distilbert",
            layers=("TransformerBlock",),
            attention="attention",
            head_dim="attention_head_size",
            q="attention.q_lin",
            k="attention.k_lin",
            v="attention.v_lin",
            o="attention.out_lin",
            fc_in=("ffn.lin1",),
            fc_out="ffn.lin2",
            heads="n_heads",
            width="dim",
        ),
        Family(
            name="wav2vec2",
            layers=(
                "Wav2Vec2EncoderLayer",
                "Wav2Vec2EncoderLayerStableLayerNorm",
                "HubertEncoderLayer",
                "HubertEncoderLayerStableLayerNorm",
            ),
            attention="attention",
            head_dim="head_dim",
            q="attention.q_proj",
            k="attention.k_proj",
            v="attention.v_proj",
            o="attention.out_proj",
            fc_in=("feed_forward.intermediate_dense",),
            fc_out="feed_forward.output_dense",
            heads="num_heads",
        ),
        replace(
            _LLAMA,
            name="opt",
            layers=("OPTDecoderLayer",),
            o="self_attn.out_proj",
            fc_in=("fc1",),
            fc_out="fc2",
            heads="num_heads",
        ),
        _LLAMA,  # q heads per kv head stay as they are, so no attribute changes
    )
}


def families_of(model: nn.Module) -> tuple[str, list[Block]]:
    """(names of the families joined by "+", attention and FFN of every layer in the order of modules)."""
    by_class = {cls: family for family in FAMILIES.values() for cls in family.layers}
    names, blocks = dict[str, None](), list[Block]()
    modules = dict(model.named_modules())
    for name, module in modules.items():
        found = next((by_class[c.__name__] for c in type(module).__mro__ if c.__name__ in by_class), None)
        if found is not None and f"{name}.{found.q}" in modules:
            names[found.name] = None
            blocks += [_attention(model, name, modules, found), _ffn(model, name, modules, found)]
    return "+".join(names), blocks


def upgraded(model: nn.Module, data: Mapping[str, Any]) -> dict[str, Any]:
    """A description of version 1 as one of version 2. model: as its config builds it.

    Raises ModelError for anything that is not such a description of this model.
    """
    where = "config.json: mptrain_structure"
    family, blocks = families_of(model)
    layers = data.get("layers")
    expected = [str(i) for i in range(len(blocks) // 2)]
    if data.get("family") != family or not isinstance(layers, Mapping) or set(layers) != set(expected):
        raise ModelError(f"{where} does not fit this {family} model of {len(expected)} layers")
    found: dict[str, Any] = {"version": 2, "blocks": {}, "tensors": {}, "attributes": {}}
    for i, one in enumerate(blocks):
        index, key = str(i // 2), one.kind
        entry = layers[index]
        number = entry.get(key) if isinstance(entry, Mapping) else None
        if type(number) is not int or not 1 <= number <= one.units:
            raise ModelError(f"{where}.layers.{index}.{key} must be 1 to {one.units}, got {short(number)}")
        found["blocks"][one.name] = {"kind": one.kind, "units": number, "of": one.units}
        for axis in one.axes if number < one.units else ():
            shape = found["tensors"].setdefault(axis.parameter, list(attributes.tensor(model, axis.parameter).shape))
            shape[axis.dim] = len(axis.kept(range(number)))
        for edit in one.edits if number < one.units else ():
            values = found["attributes"].setdefault(edit.module, {})
            now = values.get(edit.attribute, attributes.read(model.get_submodule(edit.module), edit.attribute))
            values[edit.attribute] = now - edit.per_unit * (one.units - number)
    return found


def _attention(model: nn.Module, layer: str, modules: Mapping[str, nn.Module], family: Family) -> Block:
    linears = [f"{layer}.{path}" for path in (family.q, family.k, family.v, family.o)]
    q, k, v, o = (_linear(name, modules, family) for name in linears)
    module = f"{layer}.{family.attention}"
    head_dim = getattr(modules[module], family.head_dim)
    heads, units = q.out_features // head_dim, k.out_features // head_dim
    if heads * head_dim != q.out_features or v.out_features != k.out_features or o.in_features != q.out_features:
        raise ModelError(
            f"{layer}: the projections do not fit together: q {tuple(q.weight.shape)}, k {tuple(k.weight.shape)},"
            f" v {tuple(v.weight.shape)}, o {tuple(o.weight.shape)} with heads of {head_dim}"
        )
    group = heads // units
    edits = {
        f"{module}.{attribute}": size
        for attribute, size in ((family.heads, group), (family.width, group * head_dim))
        if attribute is not None and getattr(modules[module], attribute, None) is not None
    }
    return block(
        model,
        "heads",
        units,
        sources=linears[:3],
        sinks=linears[3:],
        sides=[] if family.bias_table is None else [(f"{module}.{family.bias_table}", 1)],
        edits=edits,
        heads=group,
        cores=[module],
        layer=layer,
    )


def _ffn(model: nn.Module, layer: str, modules: Mapping[str, nn.Module], family: Family) -> Block:
    fc_in = [_linear(f"{layer}.{path}", modules, family) for path in family.fc_in]
    fc_out = _linear(f"{layer}.{family.fc_out}", modules, family)
    if any(m.out_features != fc_out.in_features for m in fc_in):
        raise ModelError(
            f"{layer}: the FFN's Linears do not fit together: {[tuple(m.weight.shape) for m in (*fc_in, fc_out)]}"
        )
    sources, sinks = [f"{layer}.{path}" for path in family.fc_in], [f"{layer}.{family.fc_out}"]
    return block(model, "ffn", fc_out.in_features, sources=sources, sinks=sinks, layer=layer)


def _linear(name: str, modules: Mapping[str, nn.Module], family: Family) -> nn.Linear:
    module = modules.get(name)
    if not isinstance(module, nn.Linear):
        found = "nothing" if module is None else type(module).__name__
        raise ModelError(
            f"{name} should be an nn.Linear in the {family.name} family, found {found}."
            " Pruning needs the plain model: merge adapters and load without 4- or 8-bit weights."
        )
    return module
