"""Palettization: a weight as indices of 1 to 8 bits into tables of 2^bits entries.

    data-free    the tables minimise Σ (w - ŵ)²
    SKM          Σ F (w - ŵ)², with the Fisher information F of importance.py (SqueezeLLM's
                 sensitive k-means): weights that the loss minds keep their values

A table serves the tensor or a group of output channels; an entry is one number or, with
cluster_dim, several neighbours of a row. With a per-channel scale, s = max |w| of the channel,
the tables hold w / s and errors count s² times: what is minimised stays the error of the weight.

Bits: as configured, or for each weight by its sensitivity, so that all meet a size budget
(sensitivity.py). Several ranks share the weights and the calibration batches (ranks.py).

Which weights: those of Linear and Embedding layers (also transformers' Conv1D) and convolutions. One whose record would
not be smaller than its fp16 values stays as it is.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.base import Batch, LossFn, model_loss
from mptrain.compress.calibrate.fisher_information import fisher
from mptrain.compress.calibrate.ranks import ALONE, Ranks, assign, share
from mptrain.compress.structure.scopes import resolve
from mptrain.compress.weights import kmeans, records
from mptrain.compress.weights.bits import Option, allocate, option
from mptrain.compress.weights.coverage import check, coverage
from mptrain.compress.weights.layers import CONVOLUTIONS, LINEAR, is_transposed
from mptrain.compress.weights.records import Palettized
from mptrain.compress.weights.vector_kmeans import cluster_vectors
from mptrain.core.embeddings import output_embedding
from mptrain.core.errors import ModelError, UserError
from mptrain.core.hooks import is_quantized
from mptrain.core.progress import track
from mptrain.recipe import Palettize

log = logging.getLogger(__name__)

WIDTHS = (1, 2, 3, 4, 6, 8)
"""Bits that a size budget chooses from: those that targets store as they are."""

LAYERS = (*LINEAR, *CONVOLUTIONS, nn.Embedding)


@dataclass(frozen=True)
class Table:
    """How one weight [rows, columns] is palettized; rows_per_group == rows is one table for the tensor.

    fixed: False where a size budget chooses the bits.
    """

    rows: int
    columns: int
    bits: int
    rows_per_group: int
    cluster_dim: int
    per_channel_scale: bool
    fixed: bool = True
    transposed: bool = False

    @property
    def smaller(self) -> bool:
        """Than the weight in fp16."""
        return self.stored_bytes < 2 * self.rows * self.columns

    @property
    def stored_bytes(self) -> int:
        """Of indices, fp16 tables and fp16 scales."""
        indices = -(-self.rows * self.columns // self.cluster_dim * self.bits // 8)
        entries = -(-self.rows // self.rows_per_group) * 2**self.bits * self.cluster_dim
        return indices + 2 * entries + (2 * self.rows if self.per_channel_scale else 0)


def palettize(
    model: nn.Module,
    config: Palettize,
    batches: Iterable[Batch] | None = None,
    *,
    loss_fn: LossFn = model_loss,
    seed: int = 0,
    widths: Sequence[int] = WIDTHS,
    ranks: Ranks = ALONE,
) -> dict[str, Palettized]:
    """Records of the weights that `config` covers, by parameter name, on the CPU; the model is not changed.

    `records.attach(model, found)` puts them into it. batches: for method skm and for a size
    budget, keyword arguments of the model with labels. seed: of the vectors' k-means++. widths:
    bits that a size budget chooses from. Layer by layer: besides the records and the Fisher
    information, one float32 per weight, memory is that of the largest layer, or with one table to
    a weight of as many layers as there are threads. With several ranks
    all call this with the same arguments and get the same records.
    Raises UserError for a pattern without a module, a cluster_dim that does not divide a layer,
    a budget below what the fewest bits take, less than half of the parameters covered, or SKM or a
    budget without data; ModelError for
    weights or gradients that are not finite.
    """
    chosen = tables(model, config, widths)
    log.info("palettized: %s", coverage(model, chosen).words())
    importance: dict[str, Tensor] = {}
    if config.method == "skm" or config.size_budget is not None:
        if batches is None:
            field = "method skm" if config.method == "skm" else "size_budget"
            raise UserError(f"palettize.{field} needs calibration data; kmeans with given bits does without")
        importance = fisher(model, batches, chosen, loss_fn, ranks)
    weighted = config.method == "skm"

    def work(name: str) -> Palettized:
        return palettized(name, model.get_parameter(name), chosen[name], importance.pop(name, None), seed)

    if config.size_budget is not None:
        chosen = _within_budget(model, chosen, config, importance, widths, seed, ranks)
    owners = assign({name: _cost(table) for name, table in chosen.items()}, ranks.count)
    importance = {name: f for name, f in importance.items() if weighted and owners[name] == ranks.index}
    shared = share(owners, work, ranks, _at_once(model, chosen))
    return dict(track(shared, "palettizing", len(owners)))


def _within_budget(
    model: nn.Module,
    chosen: Mapping[str, Table],
    config: Palettize,
    importance: Mapping[str, Tensor],
    widths: Sequence[int],
    seed: int,
    ranks: Ranks,
) -> dict[str, Table]:
    """The tables with bits for each; only what each candidate costs is kept of it."""
    assert config.size_budget is not None

    def work(name: str) -> list[Option]:
        weight, heavy = model.get_parameter(name).detach(), importance[name]
        used = heavy if config.method == "skm" else None
        candidates = _candidates(chosen[name], widths)
        return [option(weight, palettized(name, weight, table, used, seed), heavy) for table in candidates]

    costs = {name: sum(map(_cost, _candidates(table, widths))) for name, table in chosen.items()}
    shared = share(assign(costs, ranks.count), work, ranks, _at_once(model, chosen))
    options = dict(track(shared, "choosing bits", len(costs)))
    total = sum(table.rows * table.columns for table in chosen.values())
    found = allocate(options, int(config.size_budget * total / 8), "palettize.size_budget")
    return {name: replace(table, bits=found[name].bits) for name, table in chosen.items()}


def _candidates(table: Table, widths: Sequence[int]) -> list[Table]:
    if table.fixed:
        return [table]
    return [new for bits in widths if (new := replace(table, bits=bits)).smaller]


def _at_once(model: nn.Module, chosen: Mapping[str, Table]) -> int:
    """Weights to work on at once: the k-means of a CPU takes a core to a group, so one table to a weight one core."""
    device = next(model.parameters()).device
    one_core = device.type == "cpu" and all(t.rows == t.rows_per_group and t.cluster_dim == 1 for t in chosen.values())
    return torch.get_num_threads() if one_core else 1


def _cost(table: Table) -> float:
    """About proportional to the time that it takes."""
    groups = table.rows // table.rows_per_group
    if table.cluster_dim == 1:
        return kmeans.cluster_cost(groups, table.rows_per_group * table.columns, table.bits)
    return 10.0 * table.rows * table.columns * 2**table.bits


def tables(model: nn.Module, config: Palettize, widths: Sequence[int] = WIDTHS) -> dict[str, Table]:
    """What `palettize` would do to each weight, from its shape alone (also on the meta device).

    With a size budget the bits of those that are not `fixed` are still to be chosen among `widths`.
    """
    if is_quantized(model):
        raise UserError("palettize: the model has int8 quantizers; palettize in a stage that starts before them")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LAYERS)}
    names = [name for name, _ in model.named_modules()]
    ignored = resolve(config.ignore, names, "palettize.ignore")
    overrides = [(resolve([p], names, "palettize.overrides") & set(layers), p) for p in config.overrides]
    for modules, pattern in overrides:
        if not modules:
            raise UserError(f"palettize.overrides: {pattern!r} matches no Linear, Embedding or convolution")
    parameters = {id(parameter): name for name, parameter in model.named_parameters()}
    head = output_embedding(model)
    found: dict[str, Table] = {}
    seen = set()
    for name, module in layers.items():
        parameter = parameters.get(id(module.weight))
        if parameter is None or parameter in seen:
            continue  # made from other parameters (weight norm), or tied to a layer before, which decided
        seen.add(parameter)
        if name in ignored:
            continue
        choice: bool | int = True
        if isinstance(module, nn.Embedding):
            choice = config.embeddings
        elif module is head:
            choice = config.lm_head
        if choice is False:
            continue
        merged: dict[str, Any] = {"bits": config.bits if choice is True else choice}
        fixed = config.size_budget is None or choice is not True
        for modules, pattern in overrides:
            if name in modules:
                merged |= config.overrides[pattern].model_dump(exclude_none=True)
                fixed = fixed or config.overrides[pattern].bits is not None
        rows = records.matrix(module.weight, is_transposed(module))
        table = _table(name, rows, config.model_copy(update=merged))
        table = replace(table, fixed=fixed, transposed=is_transposed(module))
        if any(candidate.smaller for candidate in _candidates(table, widths)):
            found[parameter] = table
        else:
            log.info("%s stays as it is: tables would not make it smaller", parameter)
    if not found:
        raise UserError("palettize: no weight is left to palettize; make ignore narrower or group_size larger")
    kinds = "Linear, Conv1D, Embedding and convolutions"
    check(coverage(model, found), "palettize", kinds, allow_partial=config.allow_partial)
    return found


def _table(name: str, weight: Tensor, config: Palettize) -> Table:
    """weight: [rows, columns]"""
    rows, columns = weight.shape
    if columns % config.cluster_dim:
        raise UserError(
            f"palettize.cluster_dim: {config.cluster_dim} does not divide the {columns} inputs of {name};"
            f" add overrides: {{{name}: {{cluster_dim: 1}}}} or name it in ignore"
        )
    group = rows
    if config.granularity == "channel_group" and config.group_size < rows:
        group = next(g for g in range(config.group_size, 0, -1) if rows % g == 0)
        if 2 * group <= config.group_size:
            group = rows
        if group != config.group_size:
            used = f"groups of {group}" if group < rows else "one table for the tensor"
            level = logging.DEBUG if weight.is_meta else logging.INFO  # a plan asks for the same again and again
            log.log(level, "%s: its %d channels make no groups of %d; %s instead", name, rows, config.group_size, used)
    return Table(rows, columns, config.bits, group, config.cluster_dim, config.per_channel_scale)


@torch.no_grad()
def palettized(name: str, weight: Tensor, table: Table, importance: Tensor | None = None, seed: int = 0) -> Palettized:
    """The record of one weight. importance: ≥ 0, of the weight's shape. Raises ModelError for inf or NaN."""
    values = records.matrix(weight.detach(), table.transposed).float()
    weights = None if importance is None else records.matrix(importance, table.transposed)
    scale = None
    if table.per_channel_scale:
        scale = values.abs().amax(1, keepdim=True)
        smallest = scale[scale > 0].amin() if bool(scale.any()) else 1.0  # a channel of zeros stays small
        scale = torch.where(scale > 0, scale, smallest)
        half = scale.half().float()
        if bool((half > 2**-14).all()) and bool(half.isfinite().all()):
            scale = half
        values = values / scale
        weights = scale.square().expand_as(values) if weights is None else weights * scale.square()
    groups, dim = table.rows // table.rows_per_group, table.cluster_dim
    shape = (groups, -1) if dim == 1 else (groups, -1, dim)
    grouped = [None if t is None else t.reshape(shape) for t in (values, weights)]
    assert grouped[0] is not None
    try:
        if dim == 1:
            lut, indices = kmeans.cluster(grouped[0], table.bits, grouped[1])
            lut = lut[..., None]
        else:
            lut, indices = cluster_vectors(grouped[0], table.bits, grouped[1], seed=seed)
    except ValueError as error:
        raise ModelError(f"{name} cannot be palettized: {error}") from None
    return Palettized(
        indices.view(table.rows, -1).cpu(),
        as_half(lut).cpu(),
        table.rows_per_group,
        None if scale is None else scale.cpu(),
        table.bits,
        table.transposed,
    )


def as_half(lut: Tensor) -> Tensor:
    """Tables [groups, k, dim] in fp16 numbers, as targets store them, unless that costs precision.

    It does where the squares of the roundings exceed 1/256 of those of the gaps between entries:
    in narrow tables far from zero, and beyond the range of fp16.
    """
    _, k, dim = lut.shape
    gaps = lut.squeeze(2).sort(1).values.diff(dim=1) if dim == 1 else lut.std(1, correction=0) / k ** (1 / dim)
    half = lut.half().float()
    error = (half - lut).double().square().mean()
    return half if bool(error <= gaps.double().square().mean() / 256) else lut
