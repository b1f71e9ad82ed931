"""The recipe: one strict YAML file that describes a whole run.

The schema below is the documentation of the format; `mptrain schema` prints it as JSON
schema. Parsing the file (line numbers, duplicate keys, `--set`) is in `file.py`.
"""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from mptrain.recipe.base import Name, PathText, Strict
from mptrain.recipe.data import Data, Model
from mptrain.recipe.exports import EXPORTS, Export, ExportSpec
from mptrain.recipe.exports.heads import keep_score, misfit
from mptrain.recipe.precision import MixedPrecision, ShortPrecision
from mptrain.recipe.stage import Stage
from mptrain.recipe.tasks import causal


class Latency(Strict):
    batch: list[Annotated[int, Field(gt=0)]] = [1, 8]
    length: list[Annotated[int, Field(gt=0)]] = Field([32, 128], description="tokens; ignored for images")
    threads: list[Annotated[int, Field(gt=0)] | Literal["all"]] = [1, "all"]
    runs: Annotated[int, Field(gt=0)] = Field(15, description="alternating rounds over the variants")
    throughput: bool = Field(
        False, description="also time many requests at once, in examples a second: OpenVINO's hint THROUGHPUT"
    )


class Generation(Strict):
    """Text that exports with a key-value cache make, token by token."""

    prompt: Annotated[int, Field(gt=0)] = Field(64, description="tokens that go in at once, of the data")
    tokens: Annotated[int, Field(gt=1)] = Field(64, description="that each variant then writes, the most probable ones")
    texts: Annotated[int, Field(gt=0)] = Field(
        2,
        description="of data.max_length tokens, whose perplexity with the cache, token by token, is held against"
        " that without",
    )
    threads: Annotated[int, Field(gt=0)] | Literal["all"] = 1


class Evaluate(Strict):
    latency: Latency = Latency()
    generation: Generation | None = Field(
        None,
        description="causal LM: time to the first token and of further ones, memory, and the check of the cache,"
        " of every export whose cache takes texts of any length; default: not measured",
    )
    batch_size: Annotated[int, Field(gt=0)] | None = Field(
        None, description="test examples scored at a time; default: 64, or as many as keep their outputs below 64 MB"
    )
    floor: bool = Field(
        True, description="where the task has one, also score a model without a network: TF-IDF + logistic regression"
    )
    multiple_choice: Annotated[list[PathText], Field(min_length=1)] | None = Field(
        None, description="causal LM: paths of multiple_choice task files of lm-eval, scored on every exported variant"
    )


class Gates(Strict):
    """Checked at the end; a missed gate is exit status 3. Fractions, not percent."""

    max_drop: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="how far a compressed variant may score below the baseline: 0.01 is a point of accuracy or F1, 1%"
        " of a loss or perplexity; size and speed count only for variants inside it",
    )
    min_size_ratio: Annotated[float, Field(gt=0)] | None = Field(
        None, description="size of the baseline over that of the smallest variant inside max_drop"
    )
    min_speedup: dict[str, Annotated[float, Field(gt=0)]] = Field({}, description="e.g. {b1_s128_t1: 1.8}")
    parity: Annotated[float, Field(gt=0)] | None = Field(
        1e-4,
        description="|fp32 export - torch|, largest difference of an output, over its largest value where that is above"
        " 1; not of those with a float16 cache",
    )
    agreement: Annotated[float, Field(gt=0, le=1)] | None = Field(
        0.9,
        description="share of decisions (of classifiers the class; else the order of the examples, or what the task"
        " takes for it) that every other export has in common with its torch model",
    )
    cached_perplexity: Annotated[float, Field(gt=0)] | None = Field(
        1e-3,
        description="relative difference of the perplexity with the key-value cache, token by token, from that without;"
        " of variants that evaluate.generation measures",
    )
    fused_attention: Literal["all"] | Annotated[int, Field(ge=0)] | None = Field(
        "all", description="attention layers that every OpenVINO and ONNX variant must compute in one fused operation"
    )
    max_casts: Annotated[int, Field(ge=0)] | None = Field(
        None, description="conversions between float32 and float16 that the file of an ONNX variant may hold at most"
    )
    effective_precision: Literal["f32", "bf16", "f16", "i8"] | None = Field(
        None,
        description="what the layers with weights must compute in, read from the compiled OpenVINO or ONNX model: i8 of"
        " every quantized variant, the others of what is no integer layer in any variant",
    )


class Planning(Strict):
    """What `--dry-run` assumes while the model, or data of a hub or package, is not on this machine."""

    model_type: str = Field("bert", description="the default configuration of this transformers model type")
    config: dict[str, int | list[int]] = Field(
        {}, description="what differs from that default, e.g. {hidden_size: 384}"
    )
    train_rows: Annotated[int, Field(gt=0)] = 10_000


class Output(Strict):
    dir: Annotated[PathText, AfterValidator(lambda path: str(Path(path).expanduser()))] = Field(
        description="the folder of the run: checkpoints, exported models, report"
    )
    resume: Literal["auto", "never"] = Field(
        "auto", description="auto: continue the run in `dir`; never: delete it and start again, as --fresh does"
    )


class Recipe(Strict):
    version: Literal["mptrain/v1"] = Field(alias="schema")
    name: Name
    description: str = ""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    model: Model
    data: Data
    precision: Annotated[
        MixedPrecision, BeforeValidator(lambda v: v, json_schema_input_type=ShortPrecision | MixedPrecision)
    ] = Field(MixedPrecision(compute="fp32"), description="default: plain fp32 training")
    stages: Annotated[list[Stage], Field(min_length=1)]
    export: Annotated[list[Export], Field(min_length=1)]
    evaluate: Evaluate = Evaluate()
    gates: Gates = Gates()
    planning: Planning = Planning()
    presets: dict[Name, dict[str, Any]] = Field(
        {}, description="other values by name: keys as --set takes them; `--set preset=NAME` uses them"
    )
    output: Output

    @model_validator(mode="after")
    def _references(self):
        if self.evaluate.multiple_choice and not self.model.kind.causal:
            raise ValueError(f"evaluate.multiple_choice: is for task {causal()}, not for {self.model.task}; drop it")
        seen: list[str] = []
        for index, stage in enumerate(self.stages):
            where = f"stages.{stage.id}"
            if stage.id in seen:
                raise ValueError(f"{where}: the id {stage.id!r} is used twice")
            if stage.id in ("model", "self", "baseline", "pruned"):
                raise ValueError(f"{where}: the id {stage.id!r} is reserved; choose another")
            if stage.start is not None and stage.start not in ["model", *seen]:
                raise ValueError(f"{where}.from: {stage.start!r} is not 'model' or an earlier stage {seen}")
            start = self.start_of(stage)
            before = self.stage(start)
            merged = any(m.freezes for m in stage.methods)  # into weights that are stored anew
            stored = [m for m in before.methods if m.last and not ((m.again or merged) and getattr(stage, m.field))]
            if stored:
                way_out = f", or give this stage {stored[0].field} too, which acts after the merge" if merged else ""
                raise ValueError(
                    f"{where}.from: {start!r} holds compressed weights, which nothing may change after:"
                    f" start from the stage before it{way_out}"
                )
            if merged and (quantized := next((one.id for one in self.chain(start) if one.quantizes), None)):
                raise ValueError(
                    f"{where}.from: {quantized!r} leaves quantizers of activations on the very layers that adapters"
                    " are put beside: train adapters first, and quantize in a stage that starts from theirs"
                )
            self._check_teacher(f"{where}.teacher", stage, seen)
            if stage.teacher == "self" and index == 0 and stage.start is None:
                raise ValueError(f"{where}.teacher: 'self' needs an earlier stage to start from")
            against = stage.prune and stage.prune.against()
            if against is not None and against not in ["model", *seen]:
                raise ValueError(f"{where}.prune.keep.against: {against!r} is not 'model' or an earlier stage {seen}")
            if stage.distill is not None and stage.distill.replace_tokens and not self.model.kind.of_texts:
                raise ValueError(
                    f"{where}.distill.replace_tokens: the targets of {self.model.task} are not of whole texts; drop it"
                )
            empty = next((one.id for one in self.chain(stage.id) if any(m.empties() for m in one.methods)), None)
            if empty is not None and stage.distill is not None and stage.distill.attention:
                raise ValueError(
                    f"{where}.distill.attention: stage {empty!r} may leave out whole attentions (drop), which then have"
                    " no map to compare; use relations or hidden"
                )
            pruned = [earlier.prune.round_ffn for earlier in self.chain(start) if earlier.prune is not None]
            for method in stage.methods:
                if reason := next(filter(None, map(method.why_not_widths, pruned)), ""):
                    raise ValueError(f"{where}.{reason}")
            for method in stage.methods if self.precision.master == "split" else ():
                if reason := method.why_not_split():
                    raise ValueError(f"{where}.{method.field}.{reason}")
            seen.append(stage.id)
        if self.data.unlabelled is not None and not any(stage.distill for stage in self.stages):
            raise ValueError(
                "data.unlabelled: no stage has distill, so nothing learns from it; add distill, or drop it"
            )
        self._check_speedups()
        self._check_throughput()
        ids = [e.id for e in self.export]
        if len(set(ids)) != len(ids):
            raise ValueError(f"export: ids must differ, got {ids}")
        for export in self.export:
            for stage_id in export.of:
                if stage_id not in ("model", *seen):
                    raise ValueError(
                        f"export.{export.id}.of: {stage_id!r} is not a stage, nor 'model'; stages are {seen}"
                    )
            if export.cache is not None:
                self._check_cache(f"export.{export.id}.cache", export.cache)
            if export.heads:
                self._check_heads(export)
        self._check_generation()
        return self

    def _check_teacher(self, where: str, stage: Stage, earlier: list[str]) -> None:
        """A model of the hub may have any name, but not that of a stage, nor nearly."""
        teacher = stage.teacher
        if teacher in earlier and not self.rewritten(self.start_of(stage)) and (cut := self.rewritten(teacher)):
            raise ValueError(
                f"{where}: {teacher!r} reads fewer tokens since {cut!r}, and this stage starts from a model that reads"
                f" all of them, so there is no answer to copy for some: add from: {cut}, or take another teacher"
            )
        if teacher is None or teacher in ("self", "model", *earlier) or Path(teacher).expanduser().exists():
            return
        if teacher in (s.id for s in self.stages):
            raise ValueError(f"{where}: {teacher!r} is no earlier stage; earlier ones are {earlier}")
        if near := difflib.get_close_matches(teacher, [*earlier, "self", "model"], 1):
            raise ValueError(f"{where}: {teacher!r} is neither a stage nor a folder. Did you mean {near[0]!r}?")
        if teacher.startswith((".", "/", "~")):
            raise ValueError(f"{where}: there is no folder {teacher}")

    def rewritten(self, stage_id: str) -> str | None:
        """The last stage up to this one that changed the tokenizer."""
        return next((one.id for one in self.chain(stage_id) if one.rewrites), None)

    def _check_speedups(self) -> None:
        latency = self.evaluate.latency
        lengths = [""] if self.model.kind.unit is None else [f"_s{n}" for n in latency.length]
        settings = [f"b{b}{s}_t{t}" for b in latency.batch for s in lengths for t in latency.threads]
        for setting in self.gates.min_speedup:
            if setting not in settings:
                near = difflib.get_close_matches(setting, settings, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(
                    f"gates.min_speedup: {setting!r} is not measured by evaluate.latency, which has"
                    f" {', '.join(settings[:8])}{' …' if len(settings) > 8 else ''}.{hint}"
                )

    def _check_throughput(self) -> None:
        if not self.evaluate.latency.throughput:
            return
        unable = [export for export in self.export if export.timed and not export.streams]
        if not any(export.streams for export in self.export):
            unable = self.export
        if unable:
            able = " or ".join(kind.title for kind in EXPORTS.values() if kind.streams)
            named = ", ".join(f"export.{export.id} ({export.title})" for export in unable)
            raise ValueError(
                f"evaluate.latency.throughput: {named}: its runtime is timed here with one request at a time alone;"
                f" drop throughput, or export to {able} instead"
            )

    def _check_heads(self, export: ExportSpec) -> None:
        where, kind = f"export.{export.id}.heads", self.model.kind
        if why := misfit(export.heads, kind):
            raise ValueError(f"{where}: {why}")
        plain = [e for e in self.export if e.format == export.format and not e.heads and set(e.of) >= set(export.of)]
        if not keep_score(export.heads, kind) and not plain:
            given = ", ".join(head.words for head in export.heads)
            raise ValueError(
                f"{where}: {given}: task {kind.name} has no score of such outputs; export {', '.join(export.of)} to"
                f" {export.title} without heads too, so that the model is scored"
            )

    def _check_cache(self, where: str, tokens: int) -> None:
        if not self.model.kind.causal:
            raise ValueError(f"{where}: is for task {causal()}, not for {self.model.task}; drop it")
        if tokens < self.data.max_length:
            raise ValueError(
                f"{where}: {tokens} tokens are fewer than data.max_length, {self.data.max_length}, by which the"
                " export is scored: raise it"
            )

    def _check_generation(self) -> None:
        how = self.evaluate.generation
        if how is None:
            return
        able = [export for export in self.export if export.generates and export.cache is not None and not export.heads]
        if not able:
            kinds = " or ".join(name for name, spec in EXPORTS.items() if spec.generates)
            raise ValueError(f"evaluate.generation: no export keeps a cache for it; give one of {kinds} a `cache`")
        if how.prompt > self.data.max_length:
            raise ValueError(
                f"evaluate.generation.prompt: {how.prompt} is more than data.max_length, {self.data.max_length};"
                " lower it"
            )
        for export in able:
            if export.cache is not None and how.prompt + how.tokens > export.cache:
                raise ValueError(
                    f"evaluate.generation: prompt and tokens are {how.prompt + how.tokens}, more than"
                    f" export.{export.id}.cache, {export.cache}; raise the one or lower the other"
                )

    def stage(self, stage_id: str) -> Stage:
        """The stage of that id; "model" is one that does nothing."""
        if stage_id == "model":
            return Stage.model_construct(id="model")
        return next(s for s in self.stages if s.id == stage_id)

    def allowing_partial(self) -> Recipe:
        """This recipe with `allow_partial` in every method that has it."""
        stages = []
        for stage in self.stages:
            changed = {
                method.field: method.model_copy(update={"allow_partial": True})
                for method in stage.methods
                if "allow_partial" in type(method).model_fields
            }
            stages.append(stage.model_copy(update=changed))
        return self.model_copy(update={"stages": stages})

    @property
    def baseline(self) -> str:
        """What everything is compared with: the model itself where it is exported, else the first stage."""
        return "model" if any("model" in export.of for export in self.export) else self.stages[0].id

    def chain(self, stage_id: str) -> list[Stage]:
        """The stage and those that it starts from, the last first; none for "model"."""
        found = []
        while stage_id != "model":
            found.append(self.stage(stage_id))
            stage_id = self.start_of(found[-1])
        return found

    def start_of(self, stage: Stage) -> str:
        """The id of the stage that `stage` starts from, or "model"."""
        if stage.start is not None or stage.id == "model":
            return stage.start or "model"
        index = self.stages.index(stage)
        return self.stages[index - 1].id if index else "model"
