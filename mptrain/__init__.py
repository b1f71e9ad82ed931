"""Make trained networks small and fast while training them.

    mptrain.compress           prune, quantize, palettize and distil a model in memory, at once or while it trains
    mptrain.Compression        the same, phase by phase, for a training loop of your own
    mptrain.build              a torch module of your own as a model that can be trained, saved and read again
    mptrain.Recurrence         a cell run step by step, which is still a loop in exported files
    mptrain.export             a model in memory to OpenVINO, ONNX, Core ML or Core AI, run again and compared
    mptrain.inspect            what can be cut out of a model, and what half precision would do to it
    mptrain.verify             what an exported file holds and does, and whether it is the model
    mptrain.Trainer            drop-in for transformers.Trainer with compressors, distillation and half precision
    mptrain.TrainingArguments  transformers.TrainingArguments with `precision`
    mptrain.MasterWeights      half compute weights with fp32 masters, for a training loop of your own
    mptrain.LossScale          its loss scale, in detail
    mptrain.save               write a model, also a pruned or quantized one, to a folder
    mptrain.load               read it back with identical outputs
    mptrain.read_encrypted     the columns of an encrypted table

The command line is `mptrain --help`. Names are imported when they are first used. compress, export and verify are
packages too, which can be called.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mptrain.api.build import build
    from mptrain.api.compress import compress
    from mptrain.api.export import export
    from mptrain.api.inspect import inspect
    from mptrain.api.phases import Compression
    from mptrain.api.verify import verify
    from mptrain.core.recurrence import Recurrence
    from mptrain.data.sources.read import read_encrypted
    from mptrain.models.artifact import load, save
    from mptrain.precision import LossScale, MasterWeights
    from mptrain.train.arguments import TrainingArguments
    from mptrain.train.trainer import Trainer

__all__ = [
    "Compression",
    "LossScale",
    "MasterWeights",
    "Recurrence",
    "Trainer",
    "TrainingArguments",
    "build",
    "compress",
    "export",
    "inspect",
    "load",
    "read_encrypted",
    "save",
    "verify",
]

_HOMES = {
    "Compression": "mptrain.api.phases",
    "LossScale": "mptrain.precision",
    "MasterWeights": "mptrain.precision",
    "Recurrence": "mptrain.core.recurrence",
    "Trainer": "mptrain.train.trainer",
    "TrainingArguments": "mptrain.train.arguments",
    "build": "mptrain.api.build",
    "inspect": "mptrain.api.inspect",
    "load": "mptrain.models.artifact",
    "read_encrypted": "mptrain.data.sources.read",
    "save": "mptrain.models.artifact",
}
_PACKAGES = ("compress", "export", "verify")
"""which `core.face` makes callable: once one is imported, Python puts it here, whatever else has its name"""


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return import_module(f"mptrain.{name}")
    raise AttributeError(f"module 'mptrain' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
