"""`mptrain inspect`: what half precision would do to a model, and what can be cut out of it, before it is trained.

    structure blocks of units that `prune` can cut, the integers that fall with them, and what cannot be cut and why
    memory    bytes of weights, masters, gradients and moments under every precision
    export    the fp32 graph with every operation rounded to fp16: which must stay in fp32
    training  the model really run in fp16: which modules `precision.keep_fp32` must name
    speed     a matrix product and a forward, half against fp32, on this device

The two differ. Code that asks for its dtype (`finfo(x.dtype).min`, a norm that computes in fp32) protects a
model that runs in half precision, but in a graph that was exported in fp32 it has become constants and nothing.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, get_args

import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel

from mptrain.commands.advice import advice
from mptrain.compress.quantize import quantizers
from mptrain.compress.structure import saved
from mptrain.compress.structure.blocks import Block
from mptrain.compress.structure.find import find_structure
from mptrain.core.errors import ModelError, UserError
from mptrain.core.host import host
from mptrain.core.signature import Batch, Signature, probed, without_cache
from mptrain.models.samples import Loaded, Samples, load_with_inputs
from mptrain.precision import memory, speed
from mptrain.precision.half import float_products, in_half, pattern
from mptrain.precision.policy import Compute
from mptrain.verify import overflow
from mptrain.verify.difference import MAX_ERROR
from mptrain.verify.outputs import of_model, rows
from mptrain.verify.overflow import Difference, Found
from mptrain.verify.programs.aten import TorchOps
from mptrain.verify.programs.modules import HalfModules

SCHEMA = "mptrain.inspect/v1"
PASS = overflow.PASS / 2
"""of a run of all inputs that half precision is judged on; only an export has to be sure"""
LIMIT: dict[Compute, float] = {"fp16": MAX_ERROR, "bf16": 4 * MAX_ERROR}
"""of `Difference.error`: bf16 rounds eight times as coarsely, and a sound language model is off by some 5% in it"""
SEARCH_S = 30.0
"""for a choice of operations or modules; an export takes its time"""


def inspect_model(
    path: str,
    *,
    task: str | None = None,
    attn: str | None = None,
    precisions: Sequence[str] = tuple(memory.PRECISIONS),
    data: str | None = None,
    samples: int = 32,
    length: int = 128,
    allow_code: bool = False,
    processes: int = 1,
) -> dict[str, Any]:
    """Facts as JSON values; `mptrain.report.render.inspect` draws them.

    path: a model folder, packaged:NAME or a hub name. task, attn: default: from its head, and the model's own. data: a
    file of texts, or a recipe whose `data:` is used. samples: inputs to run on; length: tokens of a text, at most.
    allow_code: run code that comes with the model. precisions: of `memory.PRECISIONS`; what needs fp16 is left out
    when none of them computes in fp16. processes: over which FSDP2 would share out the training.
    Raises UserError (ModelError, DataError) for a model, data or option that cannot be used.
    """
    check_precisions(precisions)
    found = load_with_inputs(path, task, attn, data, samples, length, allow_code)
    return inspect_loaded(found, precisions, path, processes)


def check_precisions(names: Sequence[str]) -> None:
    """Raises UserError."""
    for name in names:
        if name not in memory.PRECISIONS:
            raise UserError(f"--precision must be one of {', '.join(memory.PRECISIONS)}, got {name!r}")


def inspect_loaded(found: Loaded, precisions: Sequence[str], name: str, processes: int = 1) -> dict[str, Any]:
    """`inspect_model` of a model in memory, which is put in eval mode and float32, and on the accelerator where there
    is one. name: of the model, for a reader."""
    computes = {chosen.compute for asked in precisions if (chosen := memory.PRECISIONS[asked])}
    model = quantizers.plain(found.model).float().eval()
    parameters = sum(p.numel() for p in model.parameters())
    text = found.kind.unit == "tokens"
    inputs = replace(found.samples, batches=overflow.some(found.samples.batches, parameters, text, PASS))
    facts: dict[str, Any] = {
        "schema": SCHEMA,
        "model": name,
        "class": type(model).__name__,
        "task": found.kind.name,
        "attn": _attention(model),
        "parameters": parameters,
        "tied": _tied(model),
        "inputs": {
            "source": inputs.source,
            "examples": sum(len(next(iter(b.values()))) for b in inputs.batches),
            "batches": len(inputs.batches),
        },
        "structure": None,
        "export": None,
        "training": {},
    }
    judged = _judged(model, inputs)
    facts["structure"] = _structure(model, inputs)
    keep: dict[Compute, list[str]] = {}
    if "fp16" in computes:
        facts["export"] = _export(model, judged)
    for compute in get_args(Compute):
        if compute in computes:
            facts["training"][compute] = _training(model, judged, compute)
            keep[compute] = facts["training"][compute]["keep_fp32"] or []
    facts["memory"] = [_memory(model, asked, keep) for asked in precisions]
    if processes > 1:
        whole = [a for a in precisions if (chosen := memory.PRECISIONS[a]) is None or chosen.master != "split"]
        rows_of_one = [_memory(model, asked, keep, processes) for asked in whole]
        facts["sharded"] = {"processes": processes, "memory": rows_of_one}
    facts["speed"] = _speed(model, inputs, [c for c in keep if facts["training"][c]["runs_here"]], keep)
    facts["advice"] = advice(facts)
    facts["host"] = host()
    facts["versions"] = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    return facts


# -- model and inputs


def _attention(model: nn.Module) -> str | None:
    """None for a model that is not of transformers."""
    return getattr(getattr(model, "config", None), "_attn_implementation", None)


def _tied(model: nn.Module) -> list[list[str]]:
    """Names of the parameters that are one and the same."""
    names: dict[int, list[str]] = {}
    for name, p in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(p), []).append(name)
    return [group for group in names.values() if len(group) > 1]


@dataclass(frozen=True)
class _Judged:
    """What half precision is judged on. exact: the outputs of the model in fp32 to each batch."""

    batches: list[Batch]
    signature: Signature
    exact: Sequence[dict[str, Tensor]]


def _judged(model: PreTrainedModel, inputs: Samples) -> _Judged:
    """Raises ModelError where the model does not run on the inputs, or is not a number in fp32 already."""
    try:
        signature = probed(model, inputs.batches[0])
        exact = of_model(model, inputs.batches, signature)
        bad = [name for outputs in exact for name, value in outputs.items() if torch.isnan(value).any()]
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise ModelError(
            f"{type(model).__name__} does not run on inputs that were {inputs.source}"
            f" ({', '.join(inputs.batches[0])}): {error}. Give a recipe with --data, whose data it reads."
        ) from error
    if bad:
        raise ModelError(f"{type(model).__name__} gives NaN in fp32 already (output {bad[0]}); check its weights.")
    return _Judged(inputs.batches, signature, exact)


# -- structure


def _structure(model: PreTrainedModel, inputs: Samples) -> dict[str, Any]:
    """error: why nothing can be cut; None where something can."""
    try:
        found = find_structure(model, inputs.batches[0])
    except ModelError as error:
        return {"family": None, "blocks": [], "refused": [], "dropped": _dropped(model), "error": str(error)}
    return {
        "family": found.name,
        "blocks": [_block(block) for block in found],
        "refused": [asdict(refusal) for refusal in found.refused],
        "dropped": _dropped(model),
        "error": None,
    }


def _dropped(model: PreTrainedModel) -> list[str]:
    """Names of the blocks that an earlier pruning left out whole."""
    return [name for name, block in saved.blocks(model).items() if block.get("units") == 0]


def _block(block: Block) -> dict[str, Any]:
    return {
        "name": block.name,
        "kind": block.kind,
        "layer": block.layer,
        "units": block.units,
        "heads": block.heads,
        "unit_params": block.unit_params,
        "axes": [
            {"parameter": axis.parameter, "dim": axis.dim, "role": axis.role, "per_unit": axis.per_unit}
            for axis in block.axes
        ],
        "edits": [asdict(edit) for edit in block.edits],
    }


# -- precision


def _export(model: PreTrainedModel, judged: _Judged) -> dict[str, Any]:
    program = TorchOps(model, judged.batches, judged.signature)
    found = overflow.search(program, reference=judged.exact, seconds=SEARCH_S)
    ops = {op.name: op for op in program.ops}
    ranges = [
        {"op": name, "kind": ops[name].kind, "module": ops[name].module, **asdict(found.ranges[name])} for name in ops
    ]
    facts = _found(found) | {"ops": len(ops), "ranges": ranges, "sdpa": None}
    if found.keep and _attention(model) == "eager" and getattr(model, "_supports_sdpa", False):
        model.set_attn_implementation("sdpa")
        other = overflow.search(TorchOps(model, judged.batches, judged.signature), seconds=SEARCH_S)
        model.set_attn_implementation("eager")
        facts["sdpa"] = {"keep": list(other.keep), "casts": other.casts}
    return facts


def _found(found: Found) -> dict[str, Any]:
    return {
        "keep": list(found.keep),
        "casts": found.casts,
        "reasons": dict(found.reasons),
        "before": _difference(found.before),
        "after": _difference(found.after),
        "note": found.note,
        "runs": found.runs,
        "seconds": found.seconds,
    }


def _training(model: PreTrainedModel, judged: _Judged, compute: Compute) -> dict[str, Any]:
    """keep_fp32 None: no choice of modules helps."""
    facts: dict[str, Any] = {"runs_here": True, "keep_fp32": [], "kept": 0.0, "reasons": {}}
    try:
        before = _in_half(model, judged, [], compute)
        facts |= {"before": _difference(before, compute), "after": _difference(before, compute)}
        if not before.right() and compute == "fp16":
            modules = HalfModules(model, judged.batches, judged.signature)
            found = overflow.search(modules, reference=judged.exact, seconds=SEARCH_S)
            names = [pattern(name) for name in found.keep]
            kept = {p for name in found.keep for p in model.get_submodule(name).parameters()}
            facts["kept"] = sum(p.numel() for p in kept) / sum(p.numel() for p in model.parameters())
            if facts["kept"] == 1.0:
                facts["keep_fp32"] = None
            else:
                facts |= {"keep_fp32": names, "reasons": dict(found.reasons)}
                facts["after"] = _difference(_in_half(model, judged, names, compute))
    except RuntimeError as error:  # an operation without a half kernel on this device
        facts |= {"runs_here": False, "error": " ".join(str(error).split())[:300]}
    return facts


def _difference(found: Difference, compute: Compute = "fp16") -> dict[str, Any]:
    return {**overflow.as_json(found), "right": found.right(LIMIT[compute])}


@torch.no_grad()
def _in_half(model: PreTrainedModel, judged: _Judged, keep: Sequence[str], compute: Compute) -> Difference:
    half = in_half(model, keep, compute)
    with float_products(), without_cache(half):
        return overflow.worst(
            overflow.compare(exact, rows(judged.signature.call(half, batch), batch, judged.signature))
            for batch, exact in zip(judged.batches, judged.exact, strict=True)
        )


def _memory(
    model: PreTrainedModel, precision: str, keep: dict[Compute, list[str]], processes: int = 1
) -> dict[str, Any]:
    chosen = memory.PRECISIONS[precision]
    kept = keep.get(chosen.compute, []) if chosen else []
    if processes > 1:
        found = memory.predict_sharded(model, precision, processes, kept)
    else:
        found = memory.predict(model, precision, kept)
    return {**asdict(found), "total": found.total, "per_parameter": found.per_parameter}


def _speed(
    model: PreTrainedModel, inputs: Samples, computes: Sequence[Compute], keep: dict[Compute, list[str]]
) -> dict[str, Any]:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = found or torch.device("cpu")
    moved: nn.Module = nn.Module.to(model, device)
    rows = speed.measure(moved, inputs.batches[0], computes, keep) if computes else []
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else host()["cpu"],
        "threads": torch.get_num_threads(),
        "rows": [{**asdict(row), "ratio": row.ratio, "pays": row.pays} for row in rows],
    }
