"""The variants of a run: each exported, compared with its torch model, scored on the test split, and timed.

What a variant needs to know is kept in `export/<id>.json`, so that a run that was killed
between two variants continues with the second.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
from torch import nn

from mptrain.compress.quantize import quantizers
from mptrain.compress.structure import costs
from mptrain.compress.structure.find import find_structure
from mptrain.core.disk import read_json, whole, write_json
from mptrain.core.errors import ModelError, NotFinite
from mptrain.core.host import thread_count
from mptrain.core.progress import progress
from mptrain.core.signature import Forward
from mptrain.data.lm_eval.questions import MultipleChoice
from mptrain.data.tasks.metrics import Measure, Score
from mptrain.export.base import Source, Streaming
from mptrain.export.facts import Facts
from mptrain.export.torch import heads
from mptrain.flow.context import Context
from mptrain.flow.sources import Sources
from mptrain.measure import generation, memory, throughput
from mptrain.measure import latency as measure
from mptrain.models import saved_class
from mptrain.recipe import ExportSpec, Recipe
from mptrain.recipe.exports.heads import keep_score
from mptrain.recipe.plan import Planned
from mptrain.report.build import Variant
from mptrain.verify import parity

log = logging.getLogger(__name__)

PARITY_EXAMPLES = 64  # of the validation split, which no calibration, search or training has seen


@contextmanager
def _broken(source: Source, facts: dict[str, Any]) -> Iterator[None]:
    """Inside, a quantized model whose outputs are not finite gets no scores (facts["unscored"] says why) and costs the
    others nothing; of other models that is a fault of the export, and an error."""
    try:
        yield
    except NotFinite as error:
        if not source.quantized:
            raise
        facts |= {"scores": [], "multiple_choice": {}, "unscored": str(error)}
        log.warning("%s: not scored. %s", facts["id"], error)


class Variants:
    """Steps over the variants of a run; each step of each variant is done once."""

    def __init__(self, context: Context, recipe: Recipe, questions: Sequence[MultipleChoice] = ()) -> None:
        self.context, self.recipe = context, recipe
        self.questions = questions
        self.data = context.data
        self.folder = context.folder / "export"
        self.sources = Sources(context, recipe)
        self._planned = self.sources.planned
        self._seconds: dict[str, float] = {}

    def wanted(self) -> list[Planned]:
        return list(self._planned.values())

    def export(self, planned: Planned) -> str:
        """Write export/<variant>/ with the model in its format, config and processor."""
        variant, stage = planned.id, planned.stage
        if self._facts_file(variant).is_file():
            return variant
        begun = _begun()
        source, data = self.sources.of(planned), self.sources.data(variant)
        folder, config = self.folder / variant, getattr(source.model, "config", None)
        generation = getattr(source.model, "generation_config", None) if planned.export.cache is not None else None
        code = saved_class.code_of(source.model, self.recipe.model.kind.head)
        with progress(f"export {variant}"), whole(folder, config, data.processor, generation, code) as scratch:
            written = self.sources.format(variant).write(source, scratch)
        facts = {
            "id": variant,
            "stage": stage,
            "format": planned.export.format,
            "precision": planned.precision,
            "path": (folder / written.path.relative_to(scratch)).relative_to(self.context.folder).as_posix(),
            "size_bytes": written.size_bytes,
            "written": (written.facts | _heads(planned.export)).as_json(),
            **_counts(source.model, data.example(1, self.recipe.data.max_length)),
        }
        return self._keep(facts, "export", begun)

    def verify(self, variant: str) -> str:
        """Compare the exported model with the torch model, and read from the exported one what it really does."""
        facts = read_json(self._facts_file(variant))
        if "parity" in facts:
            return variant
        begun = _begun()
        source, data = self.sources.of(self._planned[variant], facts), self.sources.data(variant)
        batches = data.held_out(PARITY_EXAMPLES, data.batch_size("validation", 16))
        with progress(f"verify {variant}"), closing(self.sources.open(source, facts)) as runner:
            known = runner.facts() | source.written
            facts |= {"parity": None, "runtime": known.as_json()}
            with _broken(source, facts):
                facts["parity"] = parity.compare(
                    source.model,
                    runner,
                    batches,
                    signature=source.signature,
                    agreement=heads.agreement(type(self.data), self._planned[variant].export.heads),
                    exact=known.exact(source.precision),
                )
        del facts["written"]
        return self._keep(facts, "verify", begun)

    def evaluate(self, variant: str) -> str:
        """Score the exported model on the test split and on the multiple-choice tasks."""
        facts = read_json(self._facts_file(variant))
        if "scores" in facts:
            return variant
        begun = _begun()
        kind, after = self.recipe.model.kind, self._planned[variant].export.heads
        facts |= {"scores": [], "multiple_choice": {}}
        if not keep_score(after, kind):
            log.info("%s: not scored, for its heads do not keep what scores are made of", variant)
            return self._keep(facts, "evaluate", begun)
        source = self.sources.of(self._planned[variant], facts)
        with closing(self.sources.open(source, facts)) as runner, _broken(source, facts):
            forward: Forward = (lambda batch: heads.restored(runner(batch), batch)) if after else runner
            scores = self.sources.data(variant).evaluate(
                forward, "test", self.recipe.evaluate.batch_size, f"test {variant}"
            )
            facts["scores"] = [score.kept() for score in scores]
            log.info("%s: test %s %.4f, %.1f MB", variant, scores[0].name, scores[0].value, facts["size_bytes"] / 1e6)
            for task in self.questions:
                found = task.evaluate(runner, progress=f"{task.name} {variant}")
                facts["multiple_choice"][task.name] = [score.kept() for score in found]
                log.info("%s: %s %s", variant, task.name, ", ".join(f"{s.name} {s.value:.4f}" for s in found))
        return self._keep(facts, "evaluate", begun)

    def generate(self, variant: str) -> str:
        """Let an export with a cache write on, and hold it against the torch model and against itself without."""
        facts, how = read_json(self._facts_file(variant)), self.recipe.evaluate.generation
        if how is None or not facts.keys().isdisjoint(("generation", "unscored")) or not self._generates(variant):
            return variant
        begun = _begun()
        prompt, texts = self._whole_texts(1, how.prompt), self._whole_texts(how.texts, self.recipe.data.max_length)
        with progress(f"generate {variant}"):
            with memory.added() as peak, closing(self._decoder(variant, facts, thread_count(how.threads))) as decoder:
                written = generation.greedy(decoder, prompt, how.tokens)
            with closing(self._decoder(variant, facts)) as decoder:
                cached = generation.cached(decoder, texts)
            model = self.sources.of(self._planned[variant], facts).model
            wanted = generation.greedy(generation.TorchDecoder(model), prompt, how.tokens)
        facts["generation"] = {
            "prompt": prompt.shape[1],
            "tokens": how.tokens,
            "threads": how.threads,
            "same_as_torch": generation.same(written, wanted),
            "perplexity": cached,
            "peak_bytes": peak.bytes,
        }
        return self._keep(facts, "generate", begun)

    def measure(self, ids: list[str]) -> list[Variant]:
        """Latency of all variants whose runtime runs here, measured in alternation."""
        facts = {i: read_json(self._facts_file(i)) for i in ids}
        latency_file = self.folder / "latency.json"
        if not latency_file.is_file():
            begun = _begun()
            timed = [i for i in ids if self._planned[i].export.timed]
            found = measure.latency(
                timed,
                lambda variant, threads: self.sources.runner(variant, facts[variant], threads),
                self.sources.read_by_all(ids).example,
                self.recipe.evaluate.latency,
                has_length=self.recipe.model.kind.unit is not None,
            )
            per_second = self._throughput(ids, facts) if self.recipe.evaluate.latency.throughput else {}
            write_json(
                latency_file,
                {"latency_ms": found, "throughput": per_second, "wall_s": time.monotonic() - begun},
            )
        measured = read_json(latency_file)
        self._seconds = {"latency": measured["wall_s"]}
        self._time_generation(facts)
        for f in facts.values():
            for step, seconds in f["wall_s"].items():
                self._seconds[step] = self._seconds.get(step, 0.0) + seconds
        return [
            _variant(
                facts[i],
                self.data.measures,
                latency_ms=measured["latency_ms"].get(i, {}),
                throughput=measured.get("throughput", {}).get(i, {}),
            )
            for i in ids
        ]

    def _throughput(self, ids: Sequence[str], facts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        def stream(variant: str, threads: int) -> throughput.Stream:
            kind = cast(Streaming, self.sources.format(variant))
            source = self.sources.of(self._planned[variant], facts[variant])
            return kind.stream(self.context.folder / facts[variant]["path"], source, threads)

        return throughput.throughput(
            [variant for variant in ids if self._planned[variant].export.streams],
            stream,
            self.sources.read_by_all(ids).example,
            self.recipe.evaluate.latency,
            has_length=self.recipe.model.kind.unit is not None,
        )

    def _time_generation(self, facts: dict[str, dict[str, Any]]) -> None:
        """Add the times to the facts of the variants that generate; once."""
        how, ids = self.recipe.evaluate.generation, [i for i, known in facts.items() if "generation" in known]
        if how is None or not ids:
            return
        file = self.folder / "generation.json"
        if not file.is_file():
            begun = _begun()
            prompt = self._whole_texts(1, how.prompt)
            found = generation.timed(ids, lambda i, threads: self._decoder(i, facts[i], threads), prompt, how)
            write_json(file, {"found": found, "wall_s": time.monotonic() - begun})
        known = read_json(file)
        self._seconds["generation"] = known["wall_s"]
        for i in ids:
            facts[i]["generation"] |= known["found"][i]

    def _generates(self, variant: str) -> bool:
        export = self._planned[variant].export
        return export.generates and export.cache is not None and not export.heads

    def _whole_texts(self, count: int, length: int) -> np.ndarray:
        """Token ids [count, at most length] of training examples, without padding."""
        batch = self.data.example(count, length)
        shortest = int(batch["attention_mask"].sum(1).min())
        return batch["input_ids"][:, :shortest].numpy()

    def _decoder(self, variant: str, facts: Mapping[str, Any], threads: int | None = None) -> Any:
        """The runner, which is a `generation.Decoder`."""
        return self.sources.runner(variant, facts, threads)

    def wall_s(self) -> dict[str, float]:
        return {k: round(v, 3) for k, v in self._seconds.items()}

    def floor(self) -> Score | None:
        """The score without a network, where the task has such a floor and it is wanted."""
        return self.data.floor(self.recipe.seed) if self.recipe.evaluate.floor else None

    def _keep(self, facts: dict[str, Any], step: str, begun: float) -> str:
        facts.setdefault("wall_s", {})[step] = time.monotonic() - begun
        write_json(self._facts_file(facts["id"]), facts)
        return facts["id"]

    def _facts_file(self, variant: str) -> Path:
        return self.folder / f"{variant}.json"


def _heads(export: ExportSpec) -> Facts:
    return Facts(more={"heads": [head.words for head in export.heads]} if export.heads else {})


def _begun() -> float:
    """The time; what the step before took is given back, for a large model's steps would add up."""
    memory.give_back()
    return time.monotonic()


def _counts(model: nn.Module, example: dict[str, Any]) -> dict[str, int | None]:
    """Parameters of all, MACs of the attention and FFN blocks for one example; None where these are not known."""
    plain = quantizers.plain(model)
    params = sum(p.numel() for p in plain.parameters())
    try:
        structure = find_structure(plain, example)
    except ModelError:
        return {"params": params, "macs": None}
    rows = costs.layer_costs(structure, costs.measure_extents(plain, structure, example))
    return {"params": params, "macs": sum(row["macs"] for row in rows)}


def _variant(facts: dict[str, Any], measures: Mapping[str, Measure], **times: Any) -> Variant:
    def scores(kept: list[dict[str, Any]]) -> list[Score]:
        return [Score.from_kept(score, measures) for score in kept]

    chosen = {task: scores(kept) for task, kept in facts.get("multiple_choice", {}).items()}
    keys = ("id", "stage", "format", "precision", "path", "size_bytes", "params", "macs", "runtime", "parity")
    return Variant(
        **{k: facts[k] for k in keys},
        scores=scores(facts["scores"]),
        multiple_choice=chosen,
        generation=facts.get("generation"),
        unscored=facts.get("unscored"),
        **times,
    )
