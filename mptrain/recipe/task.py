"""The static half of a task: what can be said of it without its data and without torch.

A task from outside gets its row in `TASKS` by `mptrain.extend.register_task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ColumnField:
    """A field of `data:` that names a column. default: None for one that is read only where the recipe names it."""

    default: str | None
    holds: str
    target: bool = False
    """what the model has to find, and does not see"""


@dataclass(frozen=True)
class TaskSpec:
    name: str
    home: str
    """module:Class of its `mptrain.data.tasks.base.Task`"""
    columns: Mapping[str, ColumnField]
    head: str | None
    """class of transformers that loads its models; AutoModel: the encoder alone; None: transformers has none"""
    processor: Literal["tokenizer", "image", "audio"] | None
    unit: Literal["tokens", "samples"] | None
    """what lengths count; None where all inputs have one size"""
    tag: str
    """`pipeline_tag` of the hub"""
    targets: tuple[str, ...] = ("labels",)
    """entries of a batch that are no inputs of an exported model"""
    options: tuple[str, ...] = ()
    """further fields of `data:` that mean something here, and not for all tasks"""
    output: str = "logits"
    """the name of the one tensor that a module of a user's own gives"""
    causal: bool = False
    """reads from left to right, and predicts the next token"""
    writes: bool = False
    """its models have a decoder, which reads the tokens so far"""
    per_token: bool = False
    """its outputs have a row for each token"""
    gives: Literal["classes", "labels", "features"] | None = None
    """what is along the last axis of its first output: scores of classes of which one is right, or of labels of which
    any are, or the features of a token; None for others. Exports may have heads for it"""
    new_head: bool = True
    """its head may be drawn anew, on an encoder that comes without one"""
    problem: str | None = None
    """`problem_type` in the config of its models"""
    endings: tuple[str, ...] = ()
    """of the names of model classes that are for it"""
    assumed: bool = False
    """of an architecture that has its head, when the model's config names none"""
    finds_end: bool = False
    """its head may read the last token that is no padding, and has to know which token pads"""
    offsets: bool = False
    """it has to know which characters or words a token stands for, as fast tokenizers alone do"""
    words: bool = False
    """its texts are lists of words"""
    floor: str | None = None
    """the model without a network that it is compared with"""
    pipeline: str | None = None
    """of transformers, that runs it; None: there is none"""
    call: str | None = None
    """what its processor is called on, as code; default: one text, image or sound"""
    optimum: str | None = None
    """class of optimum-intel that runs its OpenVINO exports"""
    cuts: bool = False
    """its pipeline cuts longer texts where it is told to"""

    @property
    def bare(self) -> bool:
        """Whether its models are encoders without a head."""
        return self.head == "AutoModel"

    @property
    def of_texts(self) -> bool:
        """Whether its targets are of whole texts, not of their tokens."""
        return self.processor == "tokenizer" and not (self.per_token or self.causal or self.writes)


NO_TASK = TaskSpec(
    "a model of its own kind",
    "mptrain.data.tasks.none:NoTask",
    {},
    head=None,
    processor=None,
    unit=None,
    tag="",
    targets=(),
)
"""of a torch module that is for none of TASKS; in no table, for no recipe can be written for it"""
