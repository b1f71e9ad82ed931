"""`mptrain.build`: a torch module of a user's own as a model with a loss, that can be trained, saved and read again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import PreTrainedModel

from mptrain.models.load import load_model
from mptrain.recipe import Model


def build(
    module: str,
    *,
    task: str,
    labels: Sequence[str] | None = None,
    arguments: Mapping[str, Any] | None = None,
    size: int | tuple[int, int] | None = None,
    path: str = "",
    seed: int = 0,
) -> PreTrainedModel:
    """What `model.module` of a recipe builds: runs FILE.py and calls NAME in it, so read the file first.

    module: "FILE.py:NAME", a function or class that gives a torch module. task: as of a recipe. labels: class names by
    index, of a task with classes; their number is given as num_labels where NAME takes it. arguments: by name. size:
    of pictures, height and width; or path: a folder with the processor. seed: draws the weights.

    - Shapes and dtypes: float32; pictures as `pixel_values` [batch, 3, height, width], texts as `input_ids` and
      `attention_mask` [batch, tokens], sounds as `input_values` [batch, samples]; `labels` as the task has them.
    - Units: of a loss those of the task, classes in nats.
    - Raises ModelError for a module that does not fit the task, pydantic's ValidationError for arguments that do not
      fit each other.
    - Source: the module's own code. `Trainer`, `compress`, `save`, `load` and `export` take the result.
    """
    picture = {} if size is None else {"picture": {"size": size if isinstance(size, int) else list(size)}}
    spec = Model.model_validate(
        {"module": module, "task": task, "arguments": dict(arguments or {}), "path": path, **picture}
    )
    return load_model(spec, labels, seed=seed, allow_code=True)
