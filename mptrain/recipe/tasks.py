"""What is known of a task without its data and without torch: one row of TASKS to a task.

Schema, loading, plan, preflight, dry run, report and card ask the row; what needs batches is in the task's own
file, the class that `home` names. A task from outside gets its row by `mptrain.extend.register_task`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from mptrain.core.errors import UserError


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

_TEXTS = {
    "text": ColumnField("text", "the text"),
    "text_pair": ColumnField(None, "the second text of a pair"),
}
_LABEL = ColumnField("label", "the class: a word or number", target=True)

TASKS: dict[str, TaskSpec] = {
    spec.name: spec
    for spec in (
        TaskSpec(
            "text-classification",
            "mptrain.data.tasks.text_classification:TextClassification",
            columns={
                **_TEXTS,
                "label": _LABEL,
            },
            head="AutoModelForSequenceClassification",
            processor="tokenizer",
            unit="tokens",
            gives="classes",
            tag="text-classification",
            pipeline="text-classification",
            options=("labels", "unlabelled"),
            problem="single_label_classification",
            endings=("ForSequenceClassification",),
            assumed=True,
            finds_end=True,
            floor="TF-IDF + logistic regression",
            optimum="OVModelForSequenceClassification",
            cuts=True,
        ),
        TaskSpec(
            "regression",
            "mptrain.data.tasks.regression:Regression",
            columns={
                **_TEXTS,
                "label": ColumnField("label", "the number", target=True),
            },
            head="AutoModelForSequenceClassification",
            processor="tokenizer",
            unit="tokens",
            tag="text-classification",
            pipeline="text-classification",
            problem="regression",
            endings=("ForSequenceClassification",),
            finds_end=True,
            floor="TF-IDF + ridge regression",
            optimum="OVModelForSequenceClassification",
            cuts=True,
        ),
        TaskSpec(
            "multi-label-classification",
            "mptrain.data.tasks.multi_label:MultiLabel",
            columns={
                **_TEXTS,
                "label": ColumnField(
                    "label", "the labels: lists, or `a|b|c`; with data.labels also a column of 0 and 1 to each", True
                ),
            },
            head="AutoModelForSequenceClassification",
            processor="tokenizer",
            unit="tokens",
            gives="labels",
            tag="text-classification",
            pipeline="text-classification",
            options=("labels",),
            problem="multi_label_classification",
            endings=("ForSequenceClassification",),
            finds_end=True,
            floor="TF-IDF + logistic regression",
            optimum="OVModelForSequenceClassification",
            cuts=True,
        ),
        TaskSpec(
            "click-rate",
            "mptrain.data.tasks.click_rate:ClickRate",
            columns={
                **_TEXTS,
                "label": ColumnField("label", "the click: 1, or 0 for none", target=True),
            },
            head="AutoModelForSequenceClassification",
            processor="tokenizer",
            unit="tokens",
            tag="text-classification",
            pipeline="text-classification",
            problem="multi_label_classification",
            endings=("ForSequenceClassification",),
            finds_end=True,
            floor="TF-IDF + logistic regression",
            optimum="OVModelForSequenceClassification",
            cuts=True,
        ),
        TaskSpec(
            "embedding",
            "mptrain.data.tasks.embedding:Embedding",
            columns={
                "text": ColumnField("text", "the text"),
                "text_pair": ColumnField(None, "a text that belongs to it"),
                "negative": ColumnField(None, "a text that does not belong to it"),
                "score": ColumnField(None, "how near the text and text_pair are: a number", target=True),
                "label": ColumnField(None, "the group: texts with one label belong together", target=True),
            },
            head="AutoModel",
            processor="tokenizer",
            unit="tokens",
            gives="features",
            tag="sentence-similarity",
            pipeline="feature-extraction",
            targets=("labels", "scores"),
            per_token=True,
            new_head=False,
            endings=("Model",),
            floor="TF-IDF + cosine",
            optimum="OVModelForFeatureExtraction",
        ),
        TaskSpec(
            "image-embedding",
            "mptrain.data.tasks.image_embedding:ImageEmbedding",
            columns={
                "image": ColumnField("image", "the picture: a path or bytes"),
                "label": ColumnField("label", "the group: pictures with one label show the same", target=True),
            },
            head=None,
            processor="image",
            unit=None,
            tag="image-feature-extraction",
            new_head=False,
            output="embedding",
        ),
        TaskSpec(
            "token-classification",
            "mptrain.data.tasks.token_classification:TokenClassification",
            columns={
                "tokens": ColumnField("tokens", "the words: lists"),
                "tags": ColumnField("tags", "their tags: lists (IOB2: B-PER, I-PER, O)", target=True),
            },
            head="AutoModelForTokenClassification",
            processor="tokenizer",
            unit="tokens",
            gives="classes",
            offsets=True,
            tag="token-classification",
            pipeline="token-classification",
            options=("labels",),
            per_token=True,
            problem="single_label_classification",
            endings=("ForTokenClassification",),
            words=True,
            optimum="OVModelForTokenClassification",
        ),
        TaskSpec(
            "question-answering",
            "mptrain.data.tasks.question_answering:QuestionAnswering",
            columns={
                "question": ColumnField("question", "the question"),
                "context": ColumnField("context", "the text that holds the answer"),
                "answers": ColumnField("answers", '{"text": [...], "answer_start": [...]}, as in SQuAD', target=True),
            },
            head="AutoModelForQuestionAnswering",
            processor="tokenizer",
            unit="tokens",
            offsets=True,
            tag="question-answering",
            targets=("start_positions", "end_positions"),
            options=("stride",),
            per_token=True,
            endings=("ForQuestionAnswering",),
            call='"the question", "the text that holds the answer"',
            optimum="OVModelForQuestionAnswering",
        ),
        TaskSpec(
            "image-classification",
            "mptrain.data.tasks.image_classification:ImageClassification",
            columns={"image": ColumnField("image", "picture files or their bytes"), "label": _LABEL},
            head="AutoModelForImageClassification",
            processor="image",
            unit=None,
            gives="classes",
            tag="image-classification",
            pipeline="image-classification",
            options=("labels", "unlabelled"),
            problem="single_label_classification",
            endings=("ForImageClassification",),
            assumed=True,
            optimum="OVModelForImageClassification",
        ),
        TaskSpec(
            "audio-classification",
            "mptrain.data.tasks.audio_classification:AudioClassification",
            columns={"audio": ColumnField("audio", "sound files, their bytes or samples"), "label": _LABEL},
            head="AutoModelForAudioClassification",
            processor="audio",
            unit="samples",
            gives="classes",
            tag="audio-classification",
            pipeline="audio-classification",
            options=("labels", "unlabelled"),
            problem="single_label_classification",
            endings=("ForAudioClassification", "ForSequenceClassification"),
            assumed=True,
            optimum="OVModelForAudioClassification",
        ),
        TaskSpec(
            "causal-lm",
            "mptrain.data.tasks.causal_lm:CausalLm",
            columns={"text": ColumnField("text", "running text")},
            head="AutoModelForCausalLM",
            processor="tokenizer",
            unit="tokens",
            gives="classes",
            tag="text-generation",
            pipeline="text-generation",
            options=("stride",),
            causal=True,
            per_token=True,
            new_head=False,
            endings=("ForCausalLM", "LMHeadModel"),
            assumed=True,
            optimum="OVModelForCausalLM",
        ),
        TaskSpec(
            "seq2seq",
            "mptrain.data.tasks.seq2seq:Seq2Seq",
            columns={
                "text": ColumnField("text", "the text"),
                "target": ColumnField("target", "the text to write", target=True),
            },
            head="AutoModelForSeq2SeqLM",
            processor="tokenizer",
            unit="tokens",
            tag="text2text-generation",
            new_head=False,
            endings=("ForConditionalGeneration",),
            writes=True,
        ),
    )
}


def options() -> set[str]:
    """Fields of `data:` that some tasks read and others do not, but for columns."""
    return {option for spec in TASKS.values() for option in spec.options}


def columns() -> dict[str, list[tuple[str, ColumnField]]]:
    """Every field that names a column: the tasks that read it, and what it is for each."""
    found: dict[str, list[tuple[str, ColumnField]]] = {}
    for spec in TASKS.values():
        for name, column in spec.columns.items():
            found.setdefault(name, []).append((spec.name, column))
    return found


def check(task: str, option: str) -> str:
    """The task. option: where it was given. Raises UserError for a name of no task."""
    if task not in TASKS:
        raise UserError(f"{option} must be one of {', '.join(TASKS)}, got {task!r}")
    return task


def causal() -> str:
    """Names of the tasks that predict the next token, for error messages."""
    return " or ".join(spec.name for spec in TASKS.values() if spec.causal)
