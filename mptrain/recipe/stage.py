"""A stage: what is trained and compressed together."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field, model_validator

from mptrain.recipe.adapters import Lora
from mptrain.recipe.base import Name, PathText, Strict
from mptrain.recipe.data import Train
from mptrain.recipe.method import MethodConfig, Weights
from mptrain.recipe.prune import PRUNE, Prune
from mptrain.recipe.tables import PALETTIZE, PaletteChoice
from mptrain.recipe.vocabulary import Vocabulary
from mptrain.recipe.weights import QUANTIZE, Quantize


class Distill(Strict):
    """loss = (1 - weight) * task + weight * T^2 * KL(student/T || teacher/T) + hidden + relations + attention terms."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    temperature: Annotated[float, Field(gt=0)] = 2.0
    hidden: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="weight of the mean squared error of hidden states; of the cosines between their tokens, where the"
        " teacher is wider or narrower",
    )
    relations: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description="weight of the divergence of how tokens relate in queries, keys and values; any number of heads,"
        " any attn",
    )
    attention: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the error of attention maps, head average; needs attn: eager"
    )
    replace_tokens: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0,
        description="share of the tokens that others of the batch take the place of, drawn anew in each step, for the"
        " student and the teacher alike: few examples teach more. For tasks with one target to a text",
    )
    tag: ClassVar[str] = "distillation"

    @property
    def inside(self) -> bool:
        """Whether more than outputs is compared."""
        return bool(self.hidden or self.relations or self.attention)

    @staticmethod
    def words(teacher: str | None) -> str:
        return f"distillation from {teacher}"


METHODS: dict[str, dict[str, type[MethodConfig]]] = {
    "prune": PRUNE,  # type: ignore[dict-item]  # a dict is invariant, and a program may add to this one
    "quantize": QUANTIZE,  # type: ignore[dict-item]
    "palettize": PALETTIZE,  # type: ignore[dict-item]
    "vocabulary": {"cut": Vocabulary},
    "adapters": {"lora": Lora},
}
"""the fields of a stage that hold settings of a method, and by name the methods that each may hold"""


class Stage(Strict):
    id: Name
    start: str | None = Field(
        None, alias="from", description="stage id to start from, or 'model'; default: the previous stage"
    )
    train: Train | None = None
    teacher: PathText | None = Field(None, description="a stage id, a model path, or 'self': the stage's own start")
    prune: Prune | None = None
    quantize: Quantize | None = None
    palettize: PaletteChoice | None = None
    vocabulary: Vocabulary | None = None
    adapters: Lora | None = None
    distill: Distill | None = None

    @model_validator(mode="after")
    def _whole(self):
        if self.distill and not self.teacher:
            raise ValueError("distill needs a teacher: give teacher: STAGE, PATH or self")
        if self.teacher and not self.distill:
            raise ValueError("teacher is given but distill is not: add distill: {weight: 0.9} or drop teacher")
        if not (self.train or self.methods):
            raise ValueError("the stage does nothing: give train, prune, quantize, palettize or vocabulary")
        if self.palettize and self.quantize:
            raise ValueError("a weight is an integer or a table entry: give quantize or palettize, or two stages")
        if self.distill and not self.train:
            raise ValueError("distill needs train")
        if self.distill and self.distill.replace_tokens and self.train and self.train.batch_size < 2:
            raise ValueError("distill.replace_tokens draws from the texts of a batch: set train.batch_size above 1")
        adapters = any(method.freezes for method in self.methods)  # merged before weights are stored
        for method in self.methods:
            if not self.train and (reason := method.why_train()):
                raise ValueError(reason)
            alone = method.why_alone()
            if alone and (self.prune or (self.train and not (adapters and method.last))):
                raise ValueError(f"{method.field} {method.by} {method.name} {alone}")
            if self.prune and (reason := method.why_not_widths(self.prune.round_ffn)):
                raise ValueError(reason)
            others = [f"{o.field} {o.by} {o.name}" for o in self.methods if o is not method and o.why_train()]
            if method.freezes and others:
                raise ValueError(
                    f"{method.field} {method.by} {method.name} and {others[0]} would both change the weights in"
                    " training: give them a stage each"
                )
        if self.prune and self.train and self.prune.schedule.unit == "epoch":
            end = self.prune.schedule.end
            if end >= self.train.epochs:
                raise ValueError(
                    f"prune.schedule.end ({end:g} epochs) must be before train.epochs ({self.train.epochs:g}):"
                    " the shrunk model needs fine-tuning"
                )
        return self

    @property
    def methods(self) -> list[MethodConfig]:
        """The settings of what it does besides training, in the order of its fields."""
        found = (getattr(self, name, None) for name in type(self).model_fields)  # a bare Stage lacks most fields
        return [value for value in found if isinstance(value, MethodConfig)]

    @property
    def reshapes(self) -> bool:
        """Whether the model is smaller after it than before."""
        return any(method.reshapes for method in self.methods)

    @property
    def rewrites(self) -> bool:
        """Whether its model comes with another tokenizer than it began with."""
        return any(method.rewrites for method in self.methods)

    def leaves(self) -> Iterator[tuple[str, Weights]]:
        """The kinds of compressed weights in its model, each with the field of the stage that asks for it."""
        for method in self.methods:
            yield from method.leaves()

    @property
    def quantizes(self) -> bool:
        """Whether it leaves fake quantizers on activations."""
        return any(weights.activations for _, weights in self.leaves())

    def tags(self) -> list[str]:
        """What it does, as a model card says it."""
        return [*(method.tag for method in self.methods), *([self.distill.tag] if self.distill else [])]

    def words(self) -> list[str]:
        """What it does besides fine-tuning, for report and card."""
        distilled = [self.distill.words(self.teacher)] if self.distill else []
        return [*(method.words() for method in self.methods), *distilled]
