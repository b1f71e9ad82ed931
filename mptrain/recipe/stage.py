"""A stage: what is trained and compressed together."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from mptrain.recipe.base import Name, Strict
from mptrain.recipe.data import Train
from mptrain.recipe.prune import Prune
from mptrain.recipe.weights import Palettize, Ptq, Qat, Quantize, WeightOnly


class Distill(Strict):
    """loss = (1 - weight) * task + weight * T^2 * KL(student/T || teacher/T) + hidden + attention terms."""

    weight: Annotated[float, Field(ge=0, le=1)] = 0.9
    temperature: Annotated[float, Field(gt=0)] = 2.0
    hidden: Annotated[float, Field(ge=0)] = Field(0.0, description="weight of the mean squared error of hidden states")
    attention: Annotated[float, Field(ge=0)] = Field(
        0.0, description="weight of the error of attention maps, head average; needs attn: eager"
    )


class Stage(Strict):
    id: Name
    start: str | None = Field(
        None, alias="from", description="stage id to start from, or 'model'; default: the previous stage"
    )
    train: Train | None = None
    teacher: str | None = Field(None, description="a stage id, a model path, or 'self': the stage's own start")
    prune: Prune | None = None
    quantize: Quantize | None = None
    palettize: Palettize | None = None
    distill: Distill | None = None

    @model_validator(mode="after")
    def _whole(self):
        if self.distill and not self.teacher:
            raise ValueError("distill needs a teacher: give teacher: STAGE, PATH or self")
        if self.teacher and not self.distill:
            raise ValueError("teacher is given but distill is not: add distill: {weight: 0.9} or drop teacher")
        if not (self.train or self.prune or self.quantize or self.palettize):
            raise ValueError("the stage does nothing: give train, prune, quantize or palettize")
        if self.palettize and self.quantize:
            raise ValueError("a weight is an integer or a table entry: give quantize or palettize, or two stages")
        if self.palettize and self.palettize.finetune and not self.train:
            raise ValueError("palettize.finetune needs train: give epochs and lr, or drop finetune")
        if self.distill and not self.train:
            raise ValueError("distill needs train")
        if isinstance(self.quantize, Qat) and not self.train:
            raise ValueError("quantize mode qat needs train; mode ptq does not")
        if isinstance(self.quantize, Ptq | WeightOnly) and (self.train or self.prune):
            raise ValueError(f"quantize mode {self.quantize.mode} goes in a stage of its own, without train and prune")
        if self.prune:
            end = self.prune.schedule.end
            if end > 0 and not self.train:
                raise ValueError("prune.schedule needs train; without train use end: 0")
            if self.train and self.prune.schedule.unit == "epoch" and end >= self.train.epochs:
                raise ValueError(
                    f"prune.schedule.end ({end:g} epochs) must be before train.epochs ({self.train.epochs:g}):"
                    " the shrunk model needs fine-tuning"
                )
        return self
