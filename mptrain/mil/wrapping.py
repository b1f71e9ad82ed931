"""What a package does before and after the model that is in it.

    ct.ImageType(scale, bias)    pixels 0..255 → mul, add (named NAME__scaled__, NAME__biased__) → the model
    a model of one's own         pixels 0..255 → mul, add, … with constants, in no other way marked → the model
    ClassifierConfig(labels)     the model → (softmax) → classify → a label, and a score to each label

The operations are read from the program, so that the model itself can be given what it would get inside.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mptrain.mil.features import Feature
from mptrain.mil.layout import LAYOUT
from mptrain.mil.math import MATH
from mptrain.mil.program import Name, Operation, Program

_SIGNS = {"mul": "×", "add": "+", "sub": "−", "real_div": "÷"}
_MOVES = ("cast", "transpose")
_VIEWS = ("cast", "reshape", "squeeze", "expand_dims", "identity")
_OPERATIONS = MATH | LAYOUT
_SHOWN = 4  # constants of a channel each

Preparation = Mapping[str, Sequence[Operation]]
"""by name of a picture, what happens to it before the model"""
Scores = Literal["softmax", "sigmoid", "as they are"]


@dataclass(frozen=True)
class Classifier:
    """label, scores: names of the package's outputs. classes: in the order of the scores, text or numbers.

    made: how the scores come from what the model gives.
    """

    label: str
    scores: str
    classes: tuple[str | int, ...]
    made: Scores


def preparations(program: Program) -> list[Preparation]:
    """What may stand before the model, the likeliest first: marked by the converter, it is one; else none or all."""
    found = {f.name: _chain(program, f) for f in program.inputs if f.picture}
    marked = {name: _marked(name, chain) for name, chain in found.items()}
    return [marked] if marked == found or any(marked.values()) else [marked, found]


def prepared(program: Program, preparation: Preparation, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the model reads, float32, when the package is given the batch (pixels as floats)."""
    result = dict(batch)
    for name, chain in preparation.items():
        value = batch[name].float()
        for operation in chain:
            arguments = {key: _constant(program, given[0], value) for key, given in operation.inputs.items()}
            value = _OPERATIONS[operation.type](**arguments)
        result[name] = value
    return result


def described(program: Program, preparation: Preparation) -> dict[str, str]:
    """In words, by name of a picture: "pixels 0..255 (RGB) × 0.00784 + [-1, -0.9, -1.1]"."""
    found = {}
    for feature in program.inputs:
        if feature.picture:
            steps = [_step(program, operation) for operation in preparation.get(feature.name, ())]
            found[feature.name] = " ".join([f"pixels 0..255 ({feature.picture})", *filter(None, steps)])
    return found


def classifier(program: Program) -> Classifier | None:
    for operation in program.main.operations:
        if operation.type == "classify":
            label, scores = (result.name for result in operation.results)
            classes = operation.inputs["classes"][0]
            named = (item if isinstance(item, str) else int(item) for item in classes)
            return Classifier(label, scores, tuple(named), _made(program, operation.inputs["probabilities"][0]))
    return None


def _chain(program: Program, picture: Feature) -> list[Operation]:
    """Operations with constants alone, each of which is all that reads the one before."""
    found: list[Operation] = []
    name = picture.name
    while True:
        readers = [operation for operation in program.main.operations if name in operation.uses()]
        if len(readers) != 1 or readers[0].type not in (*_SIGNS, *_MOVES) or name in program.main.outputs:
            return found
        others = [value for values in readers[0].inputs.values() for value in values if value != Name(name)]
        if any(isinstance(value, Name) and value.name not in program.constants for value in others):
            return found
        found.append(readers[0])
        name = readers[0].name


def _marked(name: str, chain: list[Operation]) -> list[Operation]:
    last = max((place for place, operation in enumerate(chain) if operation.name.startswith(f"{name}__")), default=-1)
    return chain[: last + 1]


def _made(program: Program, value: Any) -> Scores:
    makers = {result.name: operation for operation in program.main.operations for result in operation.results}
    while isinstance(value, Name) and value.name in makers and makers[value.name].type in _VIEWS:
        value = makers[value.name].inputs["x"][0]
    kind = makers[value.name].type if isinstance(value, Name) and value.name in makers else ""
    return "softmax" if kind == "softmax" else "sigmoid" if kind == "sigmoid" else "as they are"


def _constant(program: Program, value: Any, running: Tensor) -> Any:
    return program.constants.get(value.name, running) if isinstance(value, Name) else value


def _step(program: Program, operation: Operation) -> str:
    if operation.type not in _SIGNS:
        return "" if operation.type == "cast" else operation.type
    given = [_constant(program, operation.inputs[key][0], torch.empty(0)) for key in ("x", "y")]
    constant = next(value for value in reversed(given) if value.numel())
    numbers = [f"{number:.4g}" for number in constant.reshape(-1)[:_SHOWN].tolist()]
    shown = numbers[0] if constant.numel() == 1 else f"[{', '.join(numbers)}{', …' * (constant.numel() > _SHOWN)}]"
    return f"{_SIGNS[operation.type]} {shown}"
