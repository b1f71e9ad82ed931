"""`mptrain.TrainingArguments`: the arguments of transformers, and `precision`."""

from __future__ import annotations

import contextlib
import contextvars
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, get_args

import transformers
from pydantic import ValidationError

from mptrain.core.errors import UserError
from mptrain.recipe import LossScale, MixedPrecision, ShortPrecision, Train

HELP = (
    "Half compute weights with fp32 masters: fp16-master, bf16-master, bf16-split, bf16-split-int8 (AdamW's moments in"
    " 8 bits), fp32, or the mapping of a recipe's `precision` field (on a command line as JSON)."
)


_taken = contextvars.ContextVar("taken", default=False)


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """`transformers.TrainingArguments` with `precision`, which replaces `fp16` and `bf16`.

    precision: "fp16-master", "bf16-master", "bf16-split", "bf16-split-int8", "fp32", or the mapping that a recipe's
    `precision` field takes, e.g. {"compute": "fp16", "keep_fp32": ["norms"], "loss_scale": {"init": 1024}}. Kept as
    that mapping.

    - Shapes and dtypes: text and plain mappings; the dtype is that of forward, backward and the weights they see.
    - Units: none of its own; those of transformers hold.
    - Raises UserError for a value that is none of these, and together with fp16=True or bf16=True.
    - Source: transformers.TrainingArguments; `precision` is the field of a recipe.
    """

    precision: dict | str | None = field(default=None, metadata={"help": HELP})

    def __post_init__(self) -> None:
        if self.precision is not None:
            both = [name for name in ("fp16", "bf16") if getattr(self, name)]
            if both:
                raise UserError(
                    f"precision={self.precision!r} together with {both[0]}=True: autocast would cast what precision"
                    f" decides. Drop {both[0]}."
                )
            self.precision = parse(self.precision).model_dump(mode="json")
        super().__post_init__()

    @property
    def place_model_on_device(self) -> bool | None:
        """As transformers has it; its Trainer asks when it is made, so here it is told that it ignores `precision`."""
        compute = "fp32" if self.precision is None else parse(self.precision).compute
        if compute != "fp32" and not _taken.get():
            raise UserError(
                f"precision (compute {compute}) acts in mptrain.Trainer only, and these arguments were given to another"
                " one: use mptrain.Trainer (class T(mptrain.Trainer, YourTrainer) where you have a subclass), or"
                f" {compute}=True of transformers for autocast"
            )
        return super().place_model_on_device


def of_recipe(train: Train) -> dict[str, Any]:
    """What a recipe's `train` says by one number or word, under transformers' names."""
    return {
        "per_device_train_batch_size": train.batch_size,
        "gradient_accumulation_steps": train.accumulation,
        "learning_rate": train.lr,
        "weight_decay": train.weight_decay,
        "max_grad_norm": train.max_grad_norm,
        "logging_steps": train.log_steps,
        "report_to": train.report_to,
    }


@contextlib.contextmanager
def taken() -> Iterator[None]:
    """Inside, a Trainer is made that knows `precision`."""
    token = _taken.set(True)
    try:
        yield
    finally:
        _taken.reset(token)


def parse(value: Any) -> MixedPrecision:
    """The recipe's mapping (also as JSON), or a short name. Raises UserError."""
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f"precision: {value!r} is not JSON ({error})") from None
    try:
        return MixedPrecision.model_validate(value)
    except ValidationError as error:
        raise UserError("; ".join(_explain(e) for e in error.errors())) from None


def _explain(error: Any) -> str:
    where = ".".join(["precision", *(str(key) for key in error["loc"])])
    if error["type"] == "extra_forbidden":
        fields = LossScale.model_fields if error["loc"][0] == "loss_scale" else MixedPrecision.model_fields
        return f"{where}: unknown field; fields are {', '.join(fields)}, see docs/recipes.md"
    if error["type"] == "missing":
        return f"{where} is missing, in {error['input']!r}; see docs/recipes.md"
    if error["type"].startswith("model_"):
        return f"{where}: must be a mapping or one of {', '.join(get_args(ShortPrecision))}, got {error['input']!r}"
    if error["type"] == "value_error":
        return f"{where}: {error['msg'].removeprefix('Value error, ')}"
    return f"{where}: {error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"
