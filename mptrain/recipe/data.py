"""The model, the data and the training of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from mptrain.recipe.base import Strict

Task = Literal[
    "text-classification",
    "token-classification",
    "question-answering",
    "image-classification",
    "audio-classification",
    "causal-lm",
]


class Model(Strict):
    path: str = Field(description="packaged:NAME, a local folder, or a hub name")
    task: Task = Field(description="what the model does; decides the head, the metric and the data columns")
    attn: Literal["sdpa", "eager"] = "sdpa"
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="replaces every dropout probability of the model's config"
    )
    trust_remote_code: bool = Field(False, description="also needs --allow-code on the command line")
    modeling: str | None = Field(None, description="a local .py file with the model class; also needs --allow-code")


class Calibration(Strict):
    samples: Annotated[int, Field(gt=0)] = Field(300, description="training examples, drawn with the recipe's seed")
    batch_size: Annotated[int, Field(gt=0)] = 16


class Split(Strict):
    """Makes the splits that the data lacks."""

    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="fraction of the training rows")
    test: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="fraction of the training rows")
    group: str | None = Field(None, description="column whose values never cross splits, e.g. the film of a review")


class Data(Strict):
    source: str | None = Field(
        None, description="packaged:NAME, a `datasets` folder or a hub name; then train/validation/test are split names"
    )
    config: str | None = Field(None, description="configuration name of a hub data set")
    train: str | None = Field(None, description="a csv, tsv, jsonl, parquet or txt file, or a split name of `source`")
    validation: str | None = Field(None, description="like train; without it `split` cuts it off")
    test: str | None = Field(None, description="like train; without it `split` cuts it off")
    split: Split = Split()
    text: str | None = Field(None, description="column of the text (text classification, causal LM); default: text")
    text_pair: str | None = Field(None, description="column of the second text of a pair; default: there is none")
    label: str | None = Field(None, description="column of the class: a word or number; default: label")
    labels: list[str | int] | None = Field(
        None, description="class names by index, where a class may lack in train; default: those of the training split"
    )
    tokens: str | None = Field(None, description="column of the words, lists; default: tokens")
    tags: str | None = Field(None, description="column of their tags, lists (IOB2: B-PER, I-PER, O); default: tags")
    question: str | None = Field(None, description="column; default: question")
    context: str | None = Field(None, description="column; default: context")
    answers: str | None = Field(
        None, description='column of {"text": [...], "answer_start": [...]}, as in SQuAD; default: answers'
    )
    image: str | None = Field(None, description="column of picture files or their bytes; default: image")
    audio: str | None = Field(None, description="column of sound files, their bytes or samples; default: audio")
    max_length: Annotated[int, Field(gt=0)] = Field(128, description="tokens; audio: samples at the model's rate")
    stride: Annotated[int, Field(gt=0)] | None = Field(
        None,
        description="question answering: tokens of overlap; causal LM: tokens from one scoring window to the next,"
        " below max_length, default: half of it",
    )
    max_samples: Annotated[int, Field(gt=0)] | None = Field(None, description="cap on each split, for trying out")
    calibration: Calibration = Calibration()


class Train(Strict):
    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)] = Field(32, description="per process and micro-step")
    accumulation: Annotated[int, Field(gt=0)] = Field(1, description="micro-steps to one optimizer step")
    eval_batch_size: Annotated[int, Field(gt=0)] = 64
    schedule: Literal["linear", "cosine", "constant"] = "linear"
    warmup: Annotated[float, Field(ge=0, lt=1)] = Field(0.06, description="fraction of the stage's steps")
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(1.0, description="0 switches clipping off")
    group_by_length: bool = Field(True, description="batches of similar length; only for text")
    keep_best: bool = Field(True, description="end with the epoch that is best on validation")
    patience: Annotated[int, Field(gt=0)] | None = Field(
        None, description="stop after so many epochs without a better validation result"
    )
    checkpoint_steps: Annotated[int, Field(gt=0)] = Field(100, description="optimizer steps between checkpoints")
    log_steps: Annotated[int, Field(gt=0)] = 10
