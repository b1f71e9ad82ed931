"""What is known of a task without its data and without torch: one row of TASKS to a task.

Schema, loading, plan, preflight, dry run, report and card ask the row (task.py says what is in it); what needs batches
is in the task's own file, the class that `home` names.
"""

from __future__ import annotations

from mptrain.core.errors import UserError
from mptrain.recipe.task import ColumnField, TaskSpec

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
