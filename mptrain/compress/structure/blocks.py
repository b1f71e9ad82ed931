"""What can be cut out of a transformer: attention heads and FFN channels, layer by layer.

A *unit* is the smallest thing that leaves whole: a key/value head together with the query
heads that read it (plain multi-head attention: one head), or one FFN channel. Cutting unit
u of an attention removes rows of q, k, v and columns of o; cutting an FFN channel removes a
row of every fc_in and a column of fc_out. Nothing else of the network changes shape.

`families.py` says where these Linears are in each family.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from mptrain.compress.structure.families import FAMILIES, Family
from mptrain.core.errors import ModelError
from mptrain.core.hooks import HOOKS

VERSION = 1


@dataclass(frozen=True)
class Attention:
    """One attention block. q, k, v, o are names of nn.Linear in the model."""

    layer: str
    index: int
    q: str
    k: str
    v: str
    o: str
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int  # width of the input of q
    unit_params: int  # parameters that leave with one unit
    fixed_params: int  # the bias of o
    module: str  # the module with the attributes of `Family`
    family: str  # key of FAMILIES
    prunable: bool = True  # False: named by `ignore`; counts in a budget but is left alone

    @property
    def units(self) -> int:
        return self.kv_heads

    @property
    def group(self) -> int:
        """Query heads to a unit."""
        return self.heads // self.kv_heads

    @property
    def linears(self) -> tuple[str, ...]:
        return (self.q, self.k, self.v, self.o)

    @property
    def output(self) -> str:
        """The Linear whose columns a unit owns."""
        return self.o

    @property
    def columns(self) -> int:
        """Columns of `output` to a unit."""
        return self.group * self.head_dim


@dataclass(frozen=True)
class Ffn:
    """One feed-forward block."""

    layer: str
    index: int
    fc_in: tuple[str, ...]
    fc_out: str
    width: int
    hidden: int
    unit_params: int
    fixed_params: int
    prunable: bool = True

    @property
    def units(self) -> int:
        return self.width

    @property
    def linears(self) -> tuple[str, ...]:
        return (*self.fc_in, self.fc_out)

    @property
    def output(self) -> str:
        return self.fc_out

    @property
    def columns(self) -> int:
        return 1


Block = Attention | Ffn


@dataclass(frozen=True)
class Structure:
    """All attention and FFN blocks of a model in the order of its modules."""

    family: str
    attention: list[Attention]
    ffn: list[Ffn]

    def blocks(self) -> list[tuple[str, Block]]:
        """Every block with its kind, "heads" or "ffn"."""
        return [("heads", a) for a in self.attention] + [("ffn", f) for f in self.ffn]

    def prunable(self) -> list[tuple[str, Block]]:
        return [(kind, block) for kind, block in self.blocks() if block.prunable]


@dataclass
class Kept:
    """Units that stay, by block index; a block that is not named stays whole.

    `heads` counts units: for grouped-query attention these are key/value heads.
    """

    heads: dict[int, list[int]] = field(default_factory=dict)
    ffn: dict[int, list[int]] = field(default_factory=dict)

    def of(self, kind: str) -> dict[int, list[int]]:
        return self.heads if kind == "heads" else self.ffn

    def count(self, kind: str, block: Block) -> int:
        units = self.of(kind).get(block.index)
        return block.units if units is None else len(units)

    def to_json(self) -> dict[str, dict[str, list[int]]]:
        return {kind: {str(i): list(units) for i, units in self.of(kind).items()} for kind in ("heads", "ffn")}

    @classmethod
    def from_json(cls, data: Any) -> Kept:
        """Raises ModelError when `data` is not what `to_json` gives."""
        try:
            heads, ffn = (
                {int(i): [_index(u) for u in units] for i, units in data[kind].items()} for kind in ("heads", "ffn")
            )
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ModelError(
                'kept units must be {"heads": {"LAYER": [unit, …]}, "ffn": {…}} with whole numbers;'
                f" reading it failed with {type(error).__name__}: {error}"
            ) from None
        return cls(heads, ffn)

    def check(self, structure: Structure) -> None:
        """Raises ModelError unless every entry names existing units, ascending, at least one each."""
        for kind in ("heads", "ffn"):
            blocks = {block.index: block for k, block in structure.blocks() if k == kind}
            for index, units in self.of(kind).items():
                if index not in blocks:
                    raise ModelError(f"kept {kind} name layer {index}, but the model has layers {sorted(blocks)}")
                limit = blocks[index].units
                if not units or sorted(set(units)) != units or units[0] < 0 or units[-1] >= limit:
                    raise ModelError(
                        f"kept {kind} of layer {index} must be ascending, without repeats, between 0 and {limit - 1},"
                        f" at least one; got {_short(units)}"
                    )


def find_structure(model: nn.Module, ignore: Sequence[str] = ()) -> Structure:
    """The attention and FFN blocks of a model, dense or already shrunk, with or without NNCF's hooks.

    ignore: patterns of `scopes.resolve`; blocks with a Linear that one of them matches are
    marked not prunable.
    Raises ModelError when there is no layer of a known family or a layer is not as the
    family has it, UserError for an entry of `ignore` that matches no module.
    """
    names = {name: module for name, module in model.named_modules() if name and HOOKS not in name}
    ignored = _resolve(ignore, names)
    by_class = {cls: family for family in FAMILIES.values() for cls in family.layers}
    attention: list[Attention] = []
    ffn: list[Ffn] = []
    families: list[str] = []
    for name, module in names.items():
        found = next((by_class[c.__name__] for c in type(module).__mro__ if c.__name__ in by_class), None)
        if found is None or f"{name}.{found.q}" not in names:
            continue
        attention.append(_attention(name, len(attention), names, found, ignored))
        ffn.append(_ffn(name, len(ffn), names, found, ignored))
        if found.name not in families:
            families.append(found.name)
    if not families:
        raise ModelError(
            f"{type(model).__name__} has no attention layers that can be pruned. Supported families are"
            f" {', '.join(FAMILIES)}; use a model of one of these, or drop `prune` from the recipe."
        )
    return Structure("+".join(families), attention, ffn)


def check_not_shared(model: nn.Module, linears: Iterable[str]) -> None:
    """Raises ModelError if a weight of `linears` is also used elsewhere: cutting one would change the other."""
    users: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            users.setdefault(id(parameter), []).append(name)
    for name in linears:
        for parameter in model.get_submodule(name).parameters(recurse=False):
            others = [user for user in users[id(parameter)] if user != name]
            if others:
                raise ModelError(
                    f"{name} shares its weight with {', '.join(others)}, so units cannot be cut out of one alone."
                    f" Untie them, or leave the layer alone with prune.ignore: [{name}]."
                )


def counts(structure: Structure) -> dict[str, Any]:
    """How many units each block has, as config.json keeps it (`mptrain_structure`)."""
    layers = {str(a.index): {"heads": a.units, "ffn": f.units} for a, f in zip(structure.attention, structure.ffn)}
    return {"version": VERSION, "family": structure.family, "layers": layers}


def kept_from_counts(data: Any, structure: Structure) -> Kept:
    """A Kept that brings a dense `structure` to the unit counts of `counts`; which units does not matter.

    Raises ModelError for anything that is not such a description of this structure.
    """
    bad = "config.json: mptrain_structure"
    if not isinstance(data, Mapping) or data.get("version") != VERSION:
        found = data.get("version") if isinstance(data, Mapping) else type(data).__name__
        raise ModelError(f"{bad} must be an object of version {VERSION}, got {found!r}; load it with a newer mptrain")
    layers = data.get("layers")
    expected = {str(a.index) for a in structure.attention}
    if data.get("family") != structure.family or not isinstance(layers, Mapping) or set(layers) != expected:
        raise ModelError(f"{bad} does not fit this {structure.family} model of {len(expected)} layers")
    kept = Kept()
    for kind, block in structure.blocks():
        entry = layers[str(block.index)]
        number = entry.get(kind) if isinstance(entry, Mapping) else None
        if type(number) is not int or not 1 <= number <= block.units:
            raise ModelError(f"{bad}.layers.{block.index}.{kind} must be 1 to {block.units}, got {_short(number)}")
        if number < block.units:
            kept.of(kind)[block.index] = list(range(number))
    return kept


def _resolve(ignore: Sequence[str], names: Mapping[str, nn.Module]) -> set[str]:
    if not ignore:
        return set()
    from mptrain.compress.structure.scopes import resolve  # brings nncf along

    return resolve(ignore, names, "prune.ignore")


def _attention(layer: str, index: int, names: Mapping[str, nn.Module], family: Family, ignored: set[str]) -> Attention:
    linears = [f"{layer}.{path}" for path in (family.q, family.k, family.v, family.o)]
    q, k, v, o = (_linear(name, names, family) for name in linears)
    module = f"{layer}.{family.attention}"
    head_dim = getattr(names[module], family.head_dim)
    heads, kv_heads = q.out_features // head_dim, k.out_features // head_dim
    if heads * head_dim != q.out_features or v.out_features != k.out_features or o.in_features != q.out_features:
        raise ModelError(
            f"{layer}: the projections do not fit together: q {tuple(q.weight.shape)}, k {tuple(k.weight.shape)},"
            f" v {tuple(v.weight.shape)}, o {tuple(o.weight.shape)} with heads of {head_dim}"
        )
    group = heads // kv_heads
    unit_params = head_dim * (group * _row(q) + _row(k) + _row(v) + group * o.out_features)
    if family.bias_table is not None:
        unit_params += getattr(names[module], family.bias_table).shape[0]
    return Attention(
        layer=layer,
        index=index,
        q=linears[0],
        k=linears[1],
        v=linears[2],
        o=linears[3],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        hidden=q.in_features,
        unit_params=unit_params,
        fixed_params=0 if o.bias is None else o.out_features,
        module=module,
        family=family.name,
        prunable=ignored.isdisjoint(linears),
    )


def _ffn(layer: str, index: int, names: Mapping[str, nn.Module], family: Family, ignored: set[str]) -> Ffn:
    fc_in = [_linear(f"{layer}.{path}", names, family) for path in family.fc_in]
    fc_out = _linear(f"{layer}.{family.fc_out}", names, family)
    if any(m.out_features != fc_out.in_features for m in fc_in):
        raise ModelError(
            f"{layer}: the FFN's Linears do not fit together: {[tuple(m.weight.shape) for m in (*fc_in, fc_out)]}"
        )
    linears = tuple(f"{layer}.{path}" for path in (*family.fc_in, family.fc_out))
    return Ffn(
        layer,
        index,
        fc_in=linears[:-1],
        fc_out=linears[-1],
        width=fc_out.in_features,
        hidden=fc_in[0].in_features,
        unit_params=sum(_row(m) for m in fc_in) + fc_out.out_features,
        fixed_params=0 if fc_out.bias is None else fc_out.out_features,
        prunable=ignored.isdisjoint(linears),
    )


def _linear(name: str, names: Mapping[str, nn.Module], family: Family) -> nn.Linear:
    module = names.get(name)
    if not isinstance(module, nn.Linear):
        found = "nothing" if module is None else type(module).__name__
        raise ModelError(
            f"{name} should be an nn.Linear in the {family.name} family, found {found}."
            " Pruning needs the plain model: merge adapters and load without 4- or 8-bit weights."
        )
    return module


def _row(linear: nn.Linear) -> int:
    """Parameters of one output row."""
    return linear.in_features + (linear.bias is not None)


def _index(value: Any) -> int:
    if type(value) is not int:
        raise ValueError(f"{_short(value)} is not a whole number")
    return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}…"
