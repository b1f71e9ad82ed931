"""Make trained networks small and fast while training them.

    mptrain.Trainer            drop-in for transformers.Trainer with compressors, distillation and half precision
    mptrain.TrainingArguments  transformers.TrainingArguments with `precision`
    mptrain.MasterWeights      half compute weights with fp32 masters, for a training loop of your own
    mptrain.LossScale          its loss scale, in detail
    mptrain.save               write a model, also a pruned or quantized one, to a folder
    mptrain.load               read it back with identical outputs
    mptrain.read_encrypted     the columns of an encrypted table

The command line is `mptrain --help`. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mptrain.data.sources.read import read_encrypted
    from mptrain.models.artifact import load, save
    from mptrain.precision import LossScale, MasterWeights
    from mptrain.train.arguments import TrainingArguments
    from mptrain.train.trainer import Trainer

__all__ = ["LossScale", "MasterWeights", "Trainer", "TrainingArguments", "load", "read_encrypted", "save"]

_HOMES = {
    "LossScale": "mptrain.precision",
    "MasterWeights": "mptrain.precision",
    "Trainer": "mptrain.train.trainer",
    "TrainingArguments": "mptrain.train.arguments",
    "load": "mptrain.models.artifact",
    "read_encrypted": "mptrain.data.sources.read",
    "save": "mptrain.models.artifact",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mptrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
