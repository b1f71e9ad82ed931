"""What the variants of a run are made of: the torch model and data of each, and its file as its runtime opens it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from mptrain.data.tasks.base import Batch, Task
from mptrain.export.base import Embeddings, Format, Runner, Source
from mptrain.export.facts import Facts
from mptrain.export.formats import format_of
from mptrain.export.torch import heads
from mptrain.flow.context import Context
from mptrain.models import artifact
from mptrain.recipe import Recipe
from mptrain.recipe.plan import Planned, variants
from mptrain.recipe.weights import stored_embeddings
from mptrain.train import peaks
from mptrain.verify import overflow

CALIBRATION_EXAMPLES = 64  # of the training split, for fp16 searches
TRACED_LENGTH = 16  # of the example for the converter, in tokens, or for sound in frames


class Sources:
    """By the id of a variant. planned: all of them."""

    def __init__(self, context: Context, recipe: Recipe) -> None:
        self.context, self.recipe = context, recipe
        self.planned = {planned.id: planned for planned in variants(recipe)}

    def data(self, variant: str) -> Task:
        """As the variant's model reads them."""
        return self.context.task(self.planned[variant].stage)

    def read_by_all(self, ids: Sequence[str]) -> Task:
        """Data whose inputs every one of the variants can read: those with the fewest tokens."""
        found = {id(data): data for data in map(self.data, ids)}
        return min(found.values(), key=lambda data: len(data.processor)) if len(found) > 1 else self.context.data

    def format(self, variant: str) -> Format:
        return format_of(self.planned[variant].export)

    def of(self, planned: Planned, facts: Mapping[str, Any] | None = None) -> Source:
        """facts: of the variant, once it is written."""
        stage = self.recipe.stage(planned.stage)
        embeddings: Embeddings = stored_embeddings(stage.quantize)
        kept = {} if facts is None else facts["runtime"] if "runtime" in facts else facts["written"]

        sizes: list[int] = []  # not the source itself: in a circle with it, its model would outlive it

        def load() -> nn.Module:
            model = artifact.load(self.context.model_folder(planned.stage), allow_code=self.context.allow_code)
            sizes.append(sum(p.numel() for p in model.parameters()))
            return self.format(planned.id).torch(model, planned.precision, embeddings).eval()

        data = self.data(planned.id)
        signature = heads.signature_with(data.signature(), planned.export.heads, self.recipe.model.kind)
        return Source(
            load,
            signature,
            data.example(2, TRACED_LENGTH * data.min_length),
            planned.precision,
            embeddings,
            stage.quantizes,
            lambda: self._calibration(planned.stage, max(sizes, default=0)),
            Facts.from_json(kept),
        )

    def open(self, source: Source, facts: Mapping[str, Any], threads: int | None = None) -> Runner:
        return self.format(facts["id"]).open(self.context.folder / facts["path"], source, threads)

    def runner(self, variant: str, facts: Mapping[str, Any], threads: int | None = None) -> Runner:
        return self.open(self.of(self.planned[variant], facts), facts, threads)

    def _calibration(self, stage: str, parameters: int) -> list[Batch]:
        """Training examples: some drawn, and those with the largest activations that training saw."""
        data = self.context.task(stage)
        size = data.batch_size("train", 16)
        tokens = self.recipe.data.max_length if self.recipe.model.kind.unit == "tokens" else 1
        count = overflow.enough(parameters, tokens, CALIBRATION_EXAMPLES)
        return data.calibration(count, size) + peaks.batches(self.context.phase_folders(stage), data.secret)
