"""A recipe from the JSON configuration of NNCF 2, as optimum-intel's OVTrainer took it.

The file says how to compress; what it leaves to the training script (model, data, epochs, learning rate, teacher) is
given here. Scopes of NNCF 2 name modules by their classes (`BertLayer[3]/BertOutput[output]/NNCFLinear[dense]`): they
are looked up in the model, built without weights, and become names of modules. What a recipe cannot say is refused
with the way out where the result would be another, and noted where it is only said elsewhere or decided by mptrain.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from mptrain.core.errors import UserError
from mptrain.models.load import read_config, skeleton
from mptrain.models.samples import guess_task
from mptrain.recipe import Checkpoint, Model, file

_WRAPPED = ("Linear", "Embedding", "LayerNorm", "Conv1d", "Conv2d", "BatchNorm1d", "BatchNorm2d", "GroupNorm")
"""classes that NNCF 2 replaced by its own, whose names begin with NNCF"""

REFUSED = {
    "magnitude_sparsity": "single zeros make no model smaller or faster here; prune heads and channels instead:"
    " prune: {method: magnitude, keep: {encoder_params: …}}",
    "rb_sparsity": "single zeros make no model smaller or faster here; prune heads and channels instead:"
    " prune: {method: movement, keep: {encoder_params: …}}",
    "const_sparsity": "it keeps zeros of an earlier run; prune heads and channels instead",
    "filter_pruning": "it prunes filters of convolutions; here attention heads and FFN channels can be pruned",
    "binarization": "weights of 1 bit are tables here: palettize: {method: skm, bits: 1, finetune: {refresh: 1}}",
}
SAID_ELSEWHERE = {
    "log_dir": "output.dir",
    "accuracy_aware_training": "gates.max_drop, and --sweep over prune.keep",
    "target_device": "nothing: an OpenVINO model runs on any device",
    "compression_lr_multiplier": "prune.score_lr",
}


@dataclass
class Converted:
    """recipe: plain data that `file.validate` takes. notes: what was decided or left out, a sentence each."""

    recipe: dict[str, Any]
    notes: list[str] = field(default_factory=list)

    def text(self, source: str) -> str:
        """The recipe file, with the notes above it."""
        import yaml

        head = [f"# From {source} by mptrain convert-config. Check the notes, the data and the training."]
        head += [f"# - {note}" for note in self.notes]
        return "\n".join(head) + "\n" + yaml.safe_dump(self.recipe, sort_keys=False, allow_unicode=True, width=110)


def read(path: Path) -> Any:
    """The JSON of an NNCF configuration, which may have comments and trailing commas. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    strings = r'"(?:\\.|[^"\\])*"'
    plain = re.sub(rf"({strings})|//[^\n]*|/\*.*?\*/", lambda m: m[1] or "", text, flags=re.DOTALL)
    plain = re.sub(rf"({strings})|,(?=\s*[}}\]])", lambda m: m[1] or "", plain)
    try:
        return json.loads(plain)
    except ValueError as error:
        raise UserError(f"{path}: is not JSON: {error}") from None


def convert(
    config: Any,
    *,
    model: str,
    task: str | None = None,
    data: str | None = None,
    epochs: float | None = None,
    lr: float = 2e-5,
    teacher: str | None = None,
    distill: tuple[float, float] = (0.9, 2.0),
    allow_code: bool = False,
) -> Converted:
    """A recipe with one stage that compresses `model` as the configuration says.

    config: of `read`: a whole configuration, its `compression` alone, or one algorithm. model: a folder, packaged:NAME
    or a hub name. task: default: from the model's head. data: a file of training rows. epochs: default: one more than
    the warm-up ends, or 3. teacher: a model to distil from, with distill = (weight, temperature). allow_code: run code
    that comes with the model. Raises UserError that lists what cannot be said in a recipe.
    """
    top = config if isinstance(config, dict) and "compression" in config else {"compression": config}
    algorithms = top["compression"] if isinstance(top["compression"], list) else [top["compression"]]
    if not algorithms or not all(isinstance(one, dict) and isinstance(one.get("algorithm"), str) for one in algorithms):
        raise UserError("not a configuration of NNCF 2: `compression` must be algorithms, {algorithm: NAME, …}")
    known = task or guess_task(read_config(Checkpoint(path=model), allow_code))
    spec = Model.model_validate({"path": model, "task": known})
    stage: dict[str, Any] = {"id": "compressed", "from": "model"}
    found = Converted({"schema": "mptrain/v1", "name": "from-nncf", "description": "Converted from NNCF 2"})
    work = _Work(found.notes, Scopes(skeleton(spec, read_config(spec, allow_code), allow_code)), stage)
    for entry in algorithms:
        work.add(entry)
    if work.refused:
        raise UserError("\n".join(work.refused))
    end = stage.get("prune", {}).get("schedule", {}).get("end", 0)
    stage["train"] = {"epochs": epochs or (math.floor(end) + 1 if end else 3), "lr": lr}
    if teacher is not None:
        stage["teacher"], stage["distill"] = teacher, {"weight": distill[0], "temperature": distill[1]}
    if "prune" in stage and "quantize" in stage:
        found.notes.append(
            "quantization: begins where what was pruned is cut, which costs a little less and was measured to be ahead;"
            " quantize.start: joint has it from the first step on, as NNCF 2 had."
        )
    work.top(top)
    found.recipe |= {
        "model": {"path": model, "task": known},
        "data": {"train": data or "train.csv", **work.data},
        "stages": [stage],
        "export": [{"id": "ov", "format": "openvino", "of": ["model", "compressed"]}],
        "output": {"dir": "runs/from-nncf"},
    }
    found.notes.insert(0, "`model` is the baseline; where it is not fine-tuned yet, put a stage that trains it first.")
    file.validate(found.recipe, "from-nncf.yaml")
    return found


class Scopes:
    """NNCF 2's names of a model's modules, and the patterns of a recipe for those that its patterns match."""

    def __init__(self, model: nn.Module) -> None:
        self.modules = dict(_scopes(model))
        self.leaves = {name: m for name, m in model.named_modules() if name and not any(m.children())}

    def matched(self, patterns: Sequence[str]) -> tuple[set[str], list[str]]:
        """Names of the leaves that some pattern matches, and the patterns that match none: those name operations."""
        hits: set[str] = set()
        idle = []
        for pattern in patterns:
            own = {name for name in self.leaves if _matches(pattern, self.modules[name])}
            hits |= own
            if not own:
                idle.append(pattern)
        return hits, idle

    def patterns(self, names: set[str]) -> list[str]:
        """As a recipe's `ignore` says it: a regular expression where all layers are meant, else the name."""
        found: dict[str, None] = {}
        for name in sorted(names):
            general = "^" + re.sub(r"\\\.\d+(?=\\\.|$)", lambda _: r"\.\d+", re.escape(name)) + "$"
            alike = {other for other in self.leaves if re.search(general, other)}
            whole = len(alike) > 1 and alike <= names
            found[f"re:{general}" if whole else name] = None
        return list(found)


def _scopes(model: nn.Module) -> Iterator[tuple[str, str]]:
    """(name, NNCF 2's scope) of every module: the classes on the way to it, each with its name in brackets."""
    scopes = {"": type(model).__name__}
    for name, module in model.named_modules():
        if not name:
            continue
        above, _, last = name.rpartition(".")
        cls = type(module).__name__
        scopes[name] = f"{scopes[above]}/{'NNCF' * (cls in _WRAPPED)}{cls}[{last}]"
        yield name, scopes[name]


def _matches(pattern: str, scope: str) -> bool:
    """NNCF compared the names of operations: of a Linear its scope and then /linear_0."""
    if not pattern.startswith("{re}"):
        return pattern == scope or pattern.rpartition("/")[0] == scope
    kind = re.search(r"NNCF(\w+)\[[^/]*$", scope)
    operation = {"LayerNorm": "layer_norm"}.get(kind[1], kind[1].lower()) if kind else "call"
    try:
        return re.search(pattern.removeprefix("{re}"), f"{scope}/{operation}_0") is not None
    except re.error as error:
        raise UserError(f"ignored_scopes: {pattern!r} is not a regular expression: {error}") from None


def _list(scopes: str | list[str]) -> list[str]:
    return [scopes] if isinstance(scopes, str) else scopes


@dataclass
class _Work:
    """The stage as it grows, algorithm by algorithm."""

    notes: list[str]
    scopes: Scopes
    stage: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    refused: list[str] = field(default_factory=list)

    def add(self, entry: dict[str, Any]) -> None:
        name = entry["algorithm"]
        translate = {
            "movement_sparsity": self._movement,
            "quantization": self._quantization,
            "knowledge_distillation": self._distillation,
        }.get(name)
        if translate is not None:
            translate({key: value for key, value in entry.items() if key != "algorithm"})
        else:
            self.refused.append(f"{name}: {REFUSED.get(name, 'is not an algorithm of NNCF 2 that mptrain knows')}.")

    def top(self, config: dict[str, Any]) -> None:
        for key in config:
            if key == "input_info":
                self._input(config[key])
            elif key in SAID_ELSEWHERE:
                self.notes.append(f"{key}: in a recipe, {SAID_ELSEWHERE[key]}.")
            elif key != "compression":
                self.notes.append(f"{key}: left out; a recipe has nothing of the kind.")

    def _input(self, given: Any) -> None:
        sizes = [one.get("sample_size") for one in (given if isinstance(given, list) else [given])]
        texts = [size for size in sizes if isinstance(size, list) and len(size) == 2]
        if texts:
            self.data["max_length"] = texts[0][1]

    def _movement(self, entry: dict[str, Any]) -> None:
        params = dict(entry.pop("params", {}))
        if not params.pop("enable_structured_masking", True):
            self.refused.append(
                "movement_sparsity.params.enable_structured_masking: false leaves single zeros, which make nothing"
                " faster; here whole heads and channels go: drop it."
            )
        start, end = params.pop("warmup_start_epoch", 0), params.pop("warmup_end_epoch", 0)
        prune: dict[str, Any] = {
            "method": "movement",
            "regularization": params.pop("importance_regularization_factor", None),
            "schedule": {"start": start, "end": end, "unit": "epoch"},
        }
        if not prune["regularization"] or end <= 0:
            self.refused.append(
                "movement_sparsity.params: importance_regularization_factor and warmup_end_epoch must be given and"
                " above 0."
            )
        if (threshold := params.pop("initial_importance_threshold", None)) is not None:
            prune["threshold"] = threshold
        for key, usual in (("power", 3), ("final_importance_threshold", 0), ("steps_per_epoch", None)):
            if params.pop(key, usual) != usual and usual is not None:
                self.refused.append(f"movement_sparsity.params.{key}: must be {usual}, as mptrain has it; drop it.")
        self._left("movement_sparsity.params", params)
        shapes = entry.pop("sparse_structure_by_scopes", [])
        prune |= self._shapes(shapes)
        targets = [scope for one in shapes for scope in _list(one.get("target_scopes", []))]
        self._ignored(prune, entry.pop("ignored_scopes", []), "movement_sparsity", ("Linear",), targets)
        if entry.pop("target_scopes", None) is not None:
            self.refused.append("movement_sparsity.target_scopes: say what is left alone instead: ignored_scopes.")
        self._left("movement_sparsity", entry)
        self.stage["prune"] = prune

    def _shapes(self, given: list[dict[str, Any]]) -> dict[str, Any]:
        """Blocks on attention, rows and columns on the FFN: the latter is what mptrain does in any case."""
        blocks = [tuple(one["sparse_factors"]) for one in given if one.get("mode") == "block"]
        if len(set(blocks)) > 1:
            self.refused.append("sparse_structure_by_scopes: blocks of one size only; mptrain has one attention_block.")
        return {"attention_block": list(blocks[0])} if blocks else {}

    def _quantization(self, entry: dict[str, Any]) -> None:
        preset = entry.pop("preset", "performance")
        quantize: dict[str, Any] = {
            "mode": "qat",
            "weights": "symmetric",
            "activations": "asymmetric" if preset == "mixed" else "symmetric",
        }
        for kind in ("weights", "activations"):
            own = dict(entry.pop(kind, {}))
            quantize[kind] = own.pop("mode", quantize[kind])
            bits = own.pop("bits", 8)
            if kind == "weights" and bits == 4:
                quantize["bits"] = {"re:.": 4}
            elif bits != 8:
                self.refused.append(f"quantization.{kind}.bits: {bits} has no counterpart; 8 (weights: also 4).")
            if own.pop("per_channel", True) is False and kind == "weights":
                self.notes.append("quantization.weights.per_channel: weights have a scale per row here.")
            own.pop("signed", None)
            self._left(f"quantization.{kind}", own)

        initializer = dict(entry.pop("initializer", {}))
        ranges = initializer.pop("range", {})
        if isinstance(ranges, Mapping) and ranges.get("num_init_samples"):
            self.data["calibration"] = {"samples": ranges["num_init_samples"]}
        initializer.pop("batchnorm_adaptation", None)  # transformers have no batch norm
        self._left("quantization.initializer", initializer)
        hits = self._ignored(quantize, entry.pop("ignored_scopes", []), "quantization", ("Linear", "Conv1d", "Conv2d"))
        if any(isinstance(self.scopes.leaves[name], nn.Embedding) for name in hits):
            quantize["embeddings"] = "fp32"
        if entry.pop("overflow_fix", "disable") == "enable":
            quantize["reduce_range"] = True
        if entry.pop("scope_overrides", None):
            self.notes.append("quantization.scope_overrides: left out; attention's products are not quantized here.")
        entry.pop("export_to_onnx_standard_ops", None)
        self._left("quantization", entry)
        self.stage["quantize"] = quantize

    def _distillation(self, entry: dict[str, Any]) -> None:
        if entry.pop("type", "softmax") != "softmax":
            self.refused.append("knowledge_distillation.type: mse of logits has no counterpart; choose softmax.")
        scale, temperature = float(entry.pop("scale", 1.0)), float(entry.pop("temperature", 1.0))
        # task + scale * T² * KL is (1 + scale) times ours
        self.stage |= {"teacher": "self", "distill": {"weight": scale / (1 + scale), "temperature": temperature}}
        self.notes.append(
            f"knowledge_distillation: the loss is {1 / (1 + scale):.2g} times NNCF's, with the same balance of its"
            " terms; AdamW does not mind, SGD does."
        )
        self._left("knowledge_distillation", entry)

    def _ignored(
        self,
        into: dict[str, Any],
        patterns: str | list[str],
        algorithm: str,
        kinds: tuple[str, ...],
        among: Sequence[str] = (),
    ) -> set[str]:
        """Puts modules of these classes, among those that `among` matches, into `ignore`; returns all that matched."""
        hits, idle = self.scopes.matched(_list(patterns))
        chosen = {name for name in hits if type(self.scopes.leaves[name]).__name__ in kinds}
        if among:
            chosen &= self.scopes.matched(among)[0]
        if chosen:
            into["ignore"] = self.scopes.patterns(chosen)
        if idle:
            self.notes.append(
                f"{algorithm}.ignored_scopes: {', '.join(idle)} match no module of this model; operations between"
                " modules are neither pruned nor quantized here."
            )
        return hits

    def _left(self, where: str, entry: dict[str, Any]) -> None:
        self.notes.extend(f"{where}.{key}: left out; mptrain decides it or has nothing of the kind." for key in entry)
