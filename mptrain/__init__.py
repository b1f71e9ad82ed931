"""Make trained networks small and fast while training them.

    mptrain.Trainer    drop-in for transformers.Trainer with compressors and distillation
    mptrain.save       write a model, also a pruned or quantized one, to a folder
    mptrain.load       read it back with identical outputs

The command line is `mptrain --help`. Names are imported when they are first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mptrain.artifact import load, save
    from mptrain.train.trainer import Trainer

__all__ = ["Trainer", "load", "save"]

_HOMES = {"Trainer": "mptrain.train.trainer", "load": "mptrain.artifact", "save": "mptrain.artifact"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'mptrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
