"""The model, the data and the training of a recipe."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from mptrain.recipe import tasks
from mptrain.recipe.base import PathText, Strict
from mptrain.recipe.task import TaskSpec
from mptrain.recipe.tasks import TASKS


def _known(task: str) -> str:
    if task not in TASKS:
        *names, last = map(repr, TASKS)
        raise PydanticCustomError(
            "literal_error", "Input should be {expected}", {"expected": f"{', '.join(names)} or {last}"}
        )
    return task


TaskName = Annotated[
    str, AfterValidator(_known), Field(json_schema_extra=lambda schema: schema.update(enum=list(TASKS)))
]


class Picture(Strict):
    """What a module of your own is given: RGB, [3, height, width], (value / 255 - mean) / std."""

    size: Annotated[int, Field(gt=0)] | Annotated[list[Annotated[int, Field(gt=0)]], Field(min_length=2, max_length=2)]
    mean: float | Annotated[list[float], Field(min_length=3, max_length=3)] = 0.5
    std: Annotated[float, Field(gt=0)] | Annotated[list[float], Field(min_length=3, max_length=3)] = 0.5


class Checkpoint(Strict):
    """A model as it is saved, whatever it is for."""

    path: PathText | Literal[""] = Field(
        "",
        description="packaged:NAME, a local folder, or a hub name; with `module` only where its tokenizer or image"
        " processor is",
    )
    attn: Literal["sdpa", "eager"] = "sdpa"
    dropout: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="replaces every dropout probability of the model's config"
    )
    trust_remote_code: bool = Field(False, description="also needs --allow-code on the command line")
    modeling: PathText | None = Field(
        None,
        description="a local .py file with the model class, or the name of one in the model's folder; also needs"
        " --allow-code",
    )
    module: Annotated[str, Field(pattern=r"^[^:]+\.py:[A-Za-z_]\w*$")] | None = Field(
        None,
        description="instead of a saved model FILE.py:NAME, a function or class that gives a torch module, in a local"
        " file or one in the folder of `path`; also needs --allow-code",
    )
    arguments: dict[str, Any] = Field({}, description="of the function of `module`, by name")
    picture: Picture | None = Field(None, description="how `module` is given pictures, where there is no `path`")

    @model_validator(mode="after")
    def _one_model(self):
        if self.module is None:
            if not self.path:
                raise ValueError("path: say where the model is, or give a torch module of your own as module")
            if extra := [name for name in ("arguments", "picture") if getattr(self, name)]:
                raise ValueError(f"{extra[0]}: is for module, which is not given; drop it")
            return self
        others = {"modeling", "trust_remote_code", "dropout", "attn"} & self.model_fields_set
        if extra := sorted(name for name in others if getattr(self, name) != type(self).model_fields[name].default):
            raise ValueError(f"{extra[0]}: is for a saved model, and module is given; drop one of them")
        if self.path and self.picture is not None:
            raise ValueError("picture: the image processor of path already says it; drop one of them")
        return self

    @property
    def own_code(self) -> bool:
        """Whether code of the user's builds it."""
        return self.modeling is not None or self.module is not None

    @property
    def named(self) -> str:
        """What a reader knows it by."""
        return self.module or self.path


class Model(Checkpoint):
    """A model, and what it does."""

    task: TaskName = Field(description="what the model does; decides the head, the metric and the data columns")

    @property
    def kind(self) -> TaskSpec:
        return TASKS[self.task]


class Calibration(Strict):
    samples: Annotated[int, Field(gt=0)] = Field(300, description="training examples, drawn with the recipe's seed")
    batch_size: Annotated[int, Field(gt=0)] = 16


class Split(Strict):
    """Makes the splits that the data lacks."""

    validation: Annotated[float, Field(gt=0, lt=1)] = Field(0.1, description="fraction of the training rows")
    test: Annotated[float, Field(gt=0, lt=1)] = Field(0.2, description="fraction of the training rows")
    group: str | None = Field(None, description="column whose values never cross splits, e.g. the film of a review")


def _with_columns(schema: dict[str, Any]) -> None:
    for name in tasks.columns():
        schema["properties"][name] = {"type": "string", "title": name, "description": Data.about(name)}
    schema["additionalProperties"] = False


class Key(Strict):
    """Where the key of encrypted data is; the key itself is in no recipe. One of the three."""

    file: PathText | None = Field(None, description="a file with the key, which does not lie beside the data")
    env: str | None = Field(None, description="the environment variable that holds the key")
    command: Annotated[list[str], Field(min_length=1)] | None = Field(
        None, description="a program and its arguments that print the key, run without a shell; needs --allow-code"
    )

    @model_validator(mode="after")
    def _one(self):
        if sum(given is not None for given in (self.file, self.env, self.command)) != 1:
            raise ValueError("give one of file, env and command")
        return self


class Data(Strict):
    """Beside these fields, those that name the columns of the task."""

    model_config = ConfigDict(extra="allow", json_schema_extra=_with_columns)
    __pydantic_extra__: dict[str, str | None]

    source: PathText | None = Field(
        None, description="packaged:NAME, a `datasets` folder or a hub name; then train/validation/test are split names"
    )
    config: str | None = Field(None, description="configuration name of a hub data set")
    train: PathText | None = Field(
        None, description="a csv, tsv, jsonl, parquet or txt file, or a split name of `source`"
    )
    validation: PathText | None = Field(None, description="like train; without it `split` cuts it off")
    test: PathText | None = Field(None, description="like train; without it `split` cuts it off")
    unlabelled: PathText | None = Field(
        None,
        description="a file like train, of which the inputs alone are read: stages with `distill` are taught by the"
        " teacher on them too; inputs that are in a split are left out",
    )
    key: Key | None = Field(
        None,
        exclude=True,  # where a key is says nothing of the model: a run may continue with a key from elsewhere
        description="of data that `mptrain data encrypt` wrote; then all of it has to be encrypted",
    )
    split: Split = Split()
    labels: list[str | int] | None = Field(
        None, description="class names by index, where a class may lack in train; default: those of the training split"
    )
    max_length: Annotated[int, Field(gt=0)] = Field(128, description="tokens; audio: samples at the model's rate")
    stride: Annotated[int, Field(gt=0)] | None = Field(
        None,
        description="question answering: tokens of overlap; causal LM: tokens from one scoring window to the next,"
        " below max_length, default: half of it",
    )
    max_unknown: Annotated[float, Field(ge=0, le=1)] = Field(
        0.2, description="the share of tokens that the tokenizer may not know; more than 1% is a warning"
    )
    max_samples: Annotated[int, Field(gt=0)] | None = Field(None, description="cap on each split, for trying out")
    calibration: Calibration = Calibration()

    @model_validator(mode="after")
    def _known_columns(self):
        """Columns of other tasks are an error of their own (data/load.py), which says what the task reads."""
        given, known = self.__pydantic_extra__, tasks.columns()
        if unknown := [name for name in given if name not in known]:
            raise ValidationError.from_exception_data(
                "Data", [InitErrorDetails(type="extra_forbidden", loc=(name,), input=given[name]) for name in unknown]
            )
        return self

    @property
    def columns(self) -> dict[str, str]:
        """The columns that the recipe names, by field."""
        return {name: column for name, column in self.__pydantic_extra__.items() if column is not None}

    @classmethod
    def field_names(cls) -> list[str]:
        return [*super().field_names(), *tasks.columns()]

    @staticmethod
    def about(name: str) -> str:
        """What the field that names a column is for."""
        uses = tasks.columns()[name]
        holds = "; ".join(dict.fromkeys(column.holds for _, column in uses))
        default = next((column.default for _, column in uses), None)
        return f"column of {holds}; {f'default: {default}' if default else 'default: there is none'}"


TRACKERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet-ml",
    "clearml": "clearml",
    "trackio": "trackio",
    "swanlab": "swanlab",
    "codecarbon": "codecarbon",
}
"""to each tracker, which is also its module, what pip installs; transformers has the callbacks"""


def _tracker(name: str) -> str:
    if name not in TRACKERS:
        raise ValueError(f"{name!r} is not known; trackers are {', '.join(TRACKERS)}")
    return name


class Train(Strict):
    epochs: Annotated[float, Field(gt=0)]
    lr: Annotated[float, Field(gt=0)]
    batch_size: Annotated[int, Field(gt=0)] = Field(32, description="per process and micro-step")
    accumulation: Annotated[int, Field(gt=0)] = Field(1, description="micro-steps to one optimizer step")
    eval_batch_size: Annotated[int, Field(gt=0)] | None = Field(
        None, description="of the validation; default: 64, or as many as keep their outputs below 64 MB"
    )
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
    report_to: list[Annotated[str, AfterValidator(_tracker)]] = Field(
        [],
        exclude=True,  # it changes no model: a run may continue, and a stage be reused, with other trackers
        description="trackers that get every log, through the callbacks of transformers, each installed by you:"
        " tensorboard (events below the folder of the phase), and untested wandb, mlflow, comet_ml, clearml, trackio,"
        " swanlab, codecarbon",
    )
