"""The recipe: one strict YAML file that describes a whole run. Light: no torch.

The schema (recipe, stage, train, data, precision, prune, weights, exports) is the documentation of the format;
`tasks` has a row to each task;
`file` reads a file (line numbers, duplicate keys, `--set`), `plan` says what a recipe will do, in phases and variants.
"""

from mptrain.recipe.data import Calibration, Checkpoint, Data, Model, Split, TaskName, Train
from mptrain.recipe.exports import EXPORTS, CoreAi, CoreMl, Export, OpenVino
from mptrain.recipe.exports.base import ExportSpec
from mptrain.recipe.exports.coreml import CoreMlShapes, CoreMlTarget
from mptrain.recipe.exports.openvino import Precision
from mptrain.recipe.method import MethodConfig, Weights
from mptrain.recipe.precision import LossScale, MixedPrecision, ShortPrecision
from mptrain.recipe.prune import Curvature, Fisher, Keep, Magnitude, Movement, PruneConfig, Schedule
from mptrain.recipe.recipe import Evaluate, Gates, Generation, Latency, Output, Planning, Recipe
from mptrain.recipe.stage import METHODS, Distill, Stage
from mptrain.recipe.tables import Palettize, PalettizeConfig, TableTraining
from mptrain.recipe.task import ColumnField, TaskSpec
from mptrain.recipe.tasks import TASKS
from mptrain.recipe.weights import Ptq, Qat, QuantizeConfig, RoundedTraining, WeightOnly

__all__ = [
    "EXPORTS",
    "METHODS",
    "TASKS",
    "Calibration",
    "Checkpoint",
    "ColumnField",
    "CoreAi",
    "CoreMl",
    "CoreMlShapes",
    "CoreMlTarget",
    "Curvature",
    "Data",
    "Distill",
    "Evaluate",
    "Export",
    "ExportSpec",
    "Fisher",
    "Gates",
    "Generation",
    "Keep",
    "Latency",
    "LossScale",
    "Magnitude",
    "MethodConfig",
    "MixedPrecision",
    "Model",
    "Movement",
    "OpenVino",
    "Output",
    "Palettize",
    "PalettizeConfig",
    "Planning",
    "Precision",
    "PruneConfig",
    "Ptq",
    "Qat",
    "QuantizeConfig",
    "Recipe",
    "RoundedTraining",
    "Schedule",
    "ShortPrecision",
    "Split",
    "Stage",
    "TableTraining",
    "TaskName",
    "TaskSpec",
    "Train",
    "WeightOnly",
    "Weights",
]
