"""Weight-only quantization of a model: which weights, on which grid, by which method.

Linears (also transformers' Conv1D), convolutions (Conv1d, Conv2d), embeddings and the output embedding (lm_head) are
compressed; biases and norms stay float32, and what else there is (transposed convolutions, recurrent layers), which is
said. A convolution is its weight flattened, [out, in · kernel], of each group its own (unfolded.py). Methods without
calibration come first, so that the calibration of the others sees them; then layer by layer (layerwise.py), each on
the inputs that the compressed layers before it give. Several ranks share the weights, of a layer or of all that
need no calibration, and the calibration batches (ranks.py).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from mptrain.compress.base import LossFn, model_loss
from mptrain.compress.calibrate.fisher_information import fisher
from mptrain.compress.calibrate.layerwise import walk
from mptrain.compress.calibrate.ranks import ALONE, Ranks, assign, share
from mptrain.compress.structure.scopes import resolve
from mptrain.compress.weights import records
from mptrain.compress.weights.bits import Option, allocate, option
from mptrain.compress.weights.coverage import check, coverage
from mptrain.compress.weights.gptq import Factored, factor, gptq
from mptrain.compress.weights.grid import Grid, joined, round_to_nearest
from mptrain.compress.weights.layers import CONVOLUTIONS, LINEAR, groups_of, is_transposed
from mptrain.compress.weights.records import Record
from mptrain.compress.weights.scale_search import search
from mptrain.core.embeddings import name_in, output_embedding
from mptrain.core.errors import ModelError, UserError
from mptrain.core.hooks import is_quantized
from mptrain.core.progress import progress
from mptrain.core.signature import Batch
from mptrain.recipe import WeightOnly

log = logging.getLogger(__name__)

ROWS = Grid(bits=8, granularity="channel", symmetric=True)
"""embeddings: int8, lm_head: int8 and convolutions: int8"""


@dataclass(frozen=True)
class Choice:
    """How one weight is compressed. layer: the Linear or convolution whose inputs calibrate it; None for a mere look-up
    table. groups: of a convolution; its rows are in so many equal parts, each with inputs of its own."""

    method: str
    grid: Grid
    layer: str | None
    transposed: bool = False
    groups: int = 1


def compress(
    model: nn.Module,
    config: WeightOnly,
    batches: Sequence[Batch] = (),
    labelled: Sequence[Batch] = (),
    ranks: Ranks = ALONE,
    loss_fn: LossFn = model_loss,
) -> None:
    """Compress a plain float32 model in place; its records are there afterwards (records.of).

    batches: keyword arguments of the model, for methods `scale` and `gptq`. Without them `scale`
    minimises the error of the weights, and `gptq` is an error. labelled: batches with labels, of
    which loss_fn makes the loss, for config.size_budget. The same batches give the same integers.
    With several ranks all call this with the same arguments, and all have the whole model
    afterwards. Raises UserError for a pattern that matches nothing, block sizes that do not divide a
    weight, a budget below what 4 bits take, or a model of which less than half would be compressed;
    ModelError for weights that are not finite.
    """
    plan = choices(model, config)
    if config.size_budget is not None:
        plan = _within_budget(model, plan, config.size_budget, labelled, ranks, loss_fn)
    log.info("weights of %s bits: %s", config.bits, coverage(model, plan).words())
    calibrated = {
        choice.layer: name
        for name, choice in plan.items()
        if choice.layer is not None and (choice.method == "gptq" or (choice.method == "scale" and batches))
    }
    if not batches and any(plan[name].method == "gptq" for name in calibrated.values()):
        raise UserError("quantize.method: gptq needs calibration data; without any use scale")
    with progress("compress", len(plan), unit="weight") as bar:
        free = [name for name in plan if name not in calibrated.values()]
        owners = assign({name: _cost(model, name, plan[name]) for name in free}, ranks.count)
        for name, record in share(owners, lambda name: _record(model, name, plan[name]), ranks):
            records.attach(model, {name: record})
            bar.update()
        if not calibrated:
            return
        for by_layer in walk(model, set(calibrated), batches, ranks):
            moments = {calibrated[layer]: h for layer, h in by_layer.items()}
            for name, record in _of_layer(model, plan, moments, ranks):
                records.attach(model, {name: record})
                bar.update()


def choices(model: nn.Module, config: WeightOnly) -> dict[str, Choice]:
    """How each weight is compressed, by its first name. Raises as `compress` does."""
    if is_quantized(model):
        raise UserError("the model has fake quantizers already: compress weights in a run of their own")
    modules = [name for name, _ in model.named_modules()]
    ignored = resolve(config.ignore, modules, "quantize.ignore")
    overrides = [(resolve([p], modules, "quantize.overrides"), o) for p, o in config.overrides.items()]
    head = name_in(model, output_embedding(model))
    plan: dict[str, Choice] = {}
    problems: list[str] = []
    for weight, users in _users(model).items():
        if ignored.intersection(users):
            continue
        stored = _stored(users, head, config)
        if stored == "fp32":
            continue
        chosen: dict[str, Any] = {"method": config.method}
        chosen |= vars(ROWS) if stored == "int8" else {name: getattr(config, name) for name in vars(ROWS)}
        for hit, override in overrides:
            if hit.intersection(users):
                chosen |= override.model_dump(exclude_none=True)
        layer = next((name for name, module in users.items() if isinstance(module, (*LINEAR, *CONVOLUTIONS))), None)
        transposed = layer is not None and is_transposed(users[layer])
        groups = 1 if layer is None else groups_of(users[layer])
        columns = records.matrix(model.get_parameter(weight), transposed).shape[1]
        method, grid = chosen.pop("method"), Grid.fitting(columns, **chosen)
        try:
            grid.block(columns)
        except UserError as error:
            problems.append(f"{weight}: {error}")
        if method == "gptq" and grid.granularity == "tensor" and groups > 1:
            problems.append(
                f"{weight}: gptq rounds each of the {groups} groups of this convolution alone, so they have no scale in"
                " common: use granularity channel, or method scale, for this weight (overrides)"
            )
        plan[weight] = Choice(method, grid, layer, transposed, groups)
    if problems:
        more = f"; and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise UserError(f"quantize: {'; '.join(problems[:3])}{more}")
    if not plan:
        raise UserError("quantize.ignore: nothing is left to compress; name fewer modules")
    check(
        coverage(model, plan),
        "quantize",
        "Linear, Conv1D, Embedding and convolutions",
        allow_partial=config.allow_partial,
    )
    return plan


def _within_budget(
    model: nn.Module,
    plan: dict[str, Choice],
    budget: float,
    labelled: Sequence[Batch],
    ranks: Ranks,
    loss_fn: LossFn,
) -> dict[str, Choice]:
    """The plan with 4 or 8 bits for each weight. Candidates are rounded to nearest, whatever the method is."""
    information = fisher(model, [dict(batch) for batch in labelled], plan, loss_fn, ranks)
    options: dict[str, list[Option]] = {}
    for name, choice in plan.items():
        weight = model.get_parameter(name).detach()
        candidates = [replace(choice, method="rtn", grid=replace(choice.grid, bits=bits)) for bits in (4, 8)]
        options[name] = [option(weight, _record(model, name, other), information[name]) for other in candidates]
    total = sum(model.get_parameter(name).numel() for name in plan)
    found = allocate(options, int(budget * total / 8), "quantize.size_budget")
    return {name: replace(choice, grid=replace(choice.grid, bits=found[name].bits)) for name, choice in plan.items()}


def _users(model: nn.Module) -> dict[str, dict[str, nn.Module]]:
    """The Linears, convolutions and embeddings that use each weight, by the first name of it; several when tied."""
    first = {id(parameter): name for name, parameter in model.named_parameters()}
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if isinstance(module, (*LINEAR, *CONVOLUTIONS, nn.Embedding)) and id(module.weight) in first:
            found.setdefault(first[id(module.weight)], {})[name] = module
    return found


def _stored(users: Mapping[str, nn.Module], head: str | None, config: WeightOnly) -> str:
    """What config says of a weight: "fp32", "int8" (a scale per row) or "same" as the layers."""
    table = any(isinstance(module, nn.Embedding) for module in users.values())
    if table and head in users and config.lm_head != config.embeddings:
        raise UserError(
            f"quantize.lm_head: {config.lm_head} and quantize.embeddings: {config.embeddings} speak of one weight, for"
            f" {head} is tied to {next(iter(users))}: give both the same value"
        )
    if any(isinstance(module, CONVOLUTIONS) for module in users.values()):
        return config.convolutions
    return config.embeddings if table else config.lm_head if head in users else "same"


def _factors(moments: Mapping[str, Tensor], plan: Mapping[str, Choice]) -> dict[str, list[Factored]]:
    """By weight, one to a group; those of one matrix and block have one, and matrices of one size are factored in one
    batch."""
    blocks = {name: plan[name].grid.block(h.shape[-1]) for name, h in moments.items()}
    unique = {(id(h), blocks[name]): h for name, h in moments.items()}
    found: dict[tuple[int, int], list[Factored]] = {}
    for shape, block in sorted({(tuple(h.shape), block) for (_, block), h in unique.items()}):
        same = {key: h for key, h in unique.items() if (tuple(h.shape), key[1]) == (shape, block)}
        made = factor(torch.stack(list(same.values())).view(-1, *shape[-2:]), block)
        groups = len(made) // len(same)
        found |= {key: made[at * groups : (at + 1) * groups] for at, key in enumerate(same)}
    return {name: found[id(h), blocks[name]] for name, h in moments.items()}


def _of_layer(
    model: nn.Module, plan: Mapping[str, Choice], moments: Mapping[str, Tensor], ranks: Ranks
) -> Iterator[tuple[str, Record]]:
    """The records of the weights of one layer, given the second moments of their inputs."""
    owners = assign({name: _cost(model, name, plan[name]) for name in moments}, ranks.count)
    own = [name for name, rank in owners.items() if rank == ranks.index]
    factors = _factors({name: moments[name] for name in own if plan[name].method == "gptq"}, plan)
    work = lambda name: _record(model, name, plan[name], moments[name], factors.get(name))  # noqa: E731
    return share(owners, work, ranks)


def _matrix(model: nn.Module, name: str, choice: Choice) -> Tensor:
    """The weight, [out, in]."""
    return records.matrix(model.get_parameter(name).detach(), choice.transposed).contiguous()


def _cost(model: nn.Module, name: str, choice: Choice) -> float:
    """About proportional to the time that a weight takes."""
    rows, columns = _matrix(model, name, choice).shape
    search = {"rtn": 0.01, "scale": 1.0, "gptq": 1.0 + columns / 1000}[choice.method]
    factorisation = choice.groups * columns**3 / 1000 if choice.method == "gptq" else 0.0
    return rows * columns * search + factorisation


def _record(
    model: nn.Module, name: str, choice: Choice, moments: Tensor | None = None, known: Sequence[Factored] | None = None
) -> Record:
    """moments: of its inputs, [in, in], or of several groups [groups, in, in]; known: their factors, one to a group."""
    weight = _matrix(model, name, choice)
    try:
        if choice.method == "gptq" and known is not None:
            parts = zip(weight.chunk(choice.groups), known, strict=True)
            made = joined([gptq(rows.contiguous(), choice.grid, of_group) for rows, of_group in parts])
        elif choice.method == "rtn":
            made = round_to_nearest(weight, choice.grid)
        else:
            made = search(weight, choice.grid, None if moments is None else _importance(moments, len(weight)))
        return replace(made, transposed=choice.transposed)
    except ModelError as error:
        raise ModelError(f"{name}: {error}") from None


def _importance(moments: Tensor, rows: int) -> Tensor:
    """Mean squares of the inputs, [in], or with groups those of each row, [rows, in]."""
    squares = moments.diagonal(dim1=-2, dim2=-1)
    return squares if squares.dim() == 1 else squares.repeat_interleave(rows // len(squares), 0)
