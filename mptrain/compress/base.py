"""What a method is: something that a stage does to a model, and that makes it smaller or faster.

A stage is one or two *phases*; a phase is one optimizer, one DDP wrap, one series of checkpoints. A method never
changes the identity of a parameter inside a phase, only where a phase begins and where it ends (the boundary).

    check(config, skeleton, site)      before anything is trained, by run and dry run: on the model without weights
    check_steps(config, steps, …)      and whether its phases are long enough
    outlook(config, skeleton, sizes)   what a dry run predicts; `seconds`, how long it takes without training
    prepare(model, tools)              the phase begins (also before a resume); the highest `order` first
        still(model)                   what does not train in it, and in the phases after it
        training()                     what acts in its steps, a `TrainingMethod`, if anything does
    finalize(model, tools)             the phase ends; the lowest `order` first: structure, then integers, then records
    save(folder)                       what goes beside the model
    facts()                            for the report, as JSON

What the settings say without a model (words for the report, needs, when it acts) is `recipe/method.py`;
`methods.py` says which method takes which settings.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from mptrain.compress.calibrate.ranks import ALONE, Ranks
from mptrain.compress.runtime import Runtime, Torch
from mptrain.core.errors import UserError
from mptrain.core.signature import Batch
from mptrain.data.tasks.metrics import Score
from mptrain.recipe.method import MethodConfig

LossFn = Callable[[nn.Module, Batch], Tensor]
Config = TypeVar("Config", bound=MethodConfig)

PRUNE, QUANTIZE, RECORDS = 0, 1, 2
"""orders at a boundary: what changes shapes, what rounds, what stores weights for good"""


def model_loss(model: nn.Module, batch: Batch) -> Tensor:
    """The loss that a transformers model computes itself from the labels in the batch."""
    return model(**batch).loss


def _nothing() -> Any:
    raise UserError("this method needs calibration data: give inputs, labelled or example to Tools, or other settings")


def _unscored(model: nn.Module) -> Score:
    raise UserError(
        "quantize.ignore: auto needs the score of a task: use a recipe, give score to Tools, or name modules"
    )


def _uncounted() -> Tensor:
    raise UserError("vocabulary: needs the tokenizer and the training split of a recipe; compress through one")


@dataclass(frozen=True)
class Tools:
    """What a method may use of the run or script it acts in.

    inputs: batches of model inputs to calibrate on. labelled: the same with labels. counts: int64 [tokens], how often
    each stands in the training split. processor: the model's tokenizer, or what else makes its inputs. loss: of a model
    on a labelled batch, a scalar with its graph. score: of a model, the task's main one on the validation split.
    example: one input of `length` tokens or samples. seed: draws all that is random. steps, steps_per_epoch: optimizer
    steps of the phase; 0, it does not train. lr: of the phase. widths: bits of the tables that all targets store; None,
    any. runtime: the runtime and precision that the model is compressed for, for budgets in time and bytes. whole: the
    model that such budgets count against; None, the one that the phase begins with. once(name, make): what `make`
    measured, made by one process only, once for all attempts at the phase. shared(name, make): the same
    once for all stages of the run, where the name says all that it depends on; within `make` of `once` alone. counted:
    names the model that budgets count against, and what it is exported as, among those of the run.
    """

    inputs: Callable[[], list[Batch]] = _nothing
    counts: Callable[[], Tensor] = _uncounted
    processor: Any = None
    labelled: Callable[[], list[Batch]] = _nothing
    loss: LossFn = model_loss
    score: Callable[[nn.Module], Score] = _unscored
    example: Callable[[], Batch] = _nothing
    length: int = 128
    seed: int = 0
    steps: int = 0
    steps_per_epoch: int = 1
    lr: float = 0.0
    widths: tuple[int, ...] | None = None
    runtime: Callable[[], Runtime] = Torch
    whole: Callable[[], nn.Module] | None = None
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (immutable)
    ranks: Ranks = ALONE
    once: Callable[[str, Callable[[], Any]], Any] = lambda name, make: make()
    shared: Callable[[str, Callable[[], Any]], Any] = lambda name, make: make()
    counted: str = ""


@dataclass(frozen=True)
class Site:
    """Where settings stand and what is known there before training.

    field: of the stage, for errors. length: tokens of an input; None where inputs are not tokens. exact: whether the
    skeleton has the shapes that the method will meet; False after a stage that prunes. causal: whether the task is that
    of a language model. example: an input, where one is at hand; for models of transformers it can be made up. bytes:
    of a weight of a layer and of an embedding, as the target stores them; None, not known yet. quantized: whether the
    model then carries quantizers of activations, by this stage or one before it.
    """

    field: str
    length: int | None = None
    exact: bool = True
    causal: bool = False
    example: Batch | None = None
    bytes: tuple[float, float] | None = None
    quantized: bool = False

    @classmethod
    def beside(
        cls, method: MethodConfig, stage: Iterable[MethodConfig], before: Iterable[MethodConfig] = (), **more: Any
    ) -> Site:
        """Of a method among those of its stage, after those `before`, which say what shapes and quantizers it meets."""
        before, others = list(before), [other for other in stage if other is not method]
        first = [*before, *(other for other in others if other.early())]
        quantized = any(weights.activations for other in first for _, weights in other.leaves())
        exact = not any(other.reshapes for other in [*before, *others])
        return cls(method.field, exact=exact, quantized=quantized, **more)


@dataclass(frozen=True)
class Tables:
    """Weights that are stored as look-up tables. bits: to a weight, for a reader. size: bytes."""

    bits: str
    layers: int
    weights: int
    size: float


@dataclass(frozen=True)
class Sizes:
    """A model as a dry run predicts it; a method's `outlook` returns what it makes of it.

    layers, embeddings, other: parameters of the attention and FFN blocks, of embeddings, of all else. macs: of the
    blocks, for one input. layer_bytes, embedding_bytes: of a parameter of (layers and all else, embeddings), as the
    method stores it; None, as floats of the target's precision. tables: the weights that the method stores so, as
    many as the skeleton has. step: the time of a training step against a plain one. known: False where only training
    tells how much stays.
    """

    layers: float
    embeddings: float
    other: float
    macs: float
    layer_bytes: float | None = None
    embedding_bytes: float | None = None
    tables: tuple[Tables, ...] = ()
    step: float = 1.0
    known: bool = True

    @property
    def params(self) -> float:
        return self.layers + self.embeddings + self.other

    def kept(self, fraction: float | None) -> Sizes:
        """With that part of the blocks; None: only training tells."""
        if fraction is None:
            return replace(self, known=False)
        return replace(self, layers=self.layers * fraction, macs=self.macs * fraction)


class TrainingMethod(Protocol):
    """What acts in the steps of a phase. Tensors in states are detached CPU copies.

    forward, backward
    gradients(usable)  averaged over ranks and micro-steps, not yet clipped
    optimizer step     none where they were not usable
    updated(step)      `step` optimizer steps are done now
    """

    @property
    def name(self) -> str:
        """Names its file in a checkpoint."""
        ...

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Extra optimizer groups, e.g. scores with their own lr. Not parameters of the model."""
        ...

    def gradients(self, usable: bool) -> None:
        """usable: False when a half gradient overflowed: the optimizer step is skipped."""
        ...

    def follow(self, masters: MasterView | None) -> None:
        """The model's weights are half copies of these masters from now on; None: they are fp32 again."""
        ...

    def updated(self, step: int) -> None: ...

    def logs(self) -> dict[str, float]:
        """Scalars for the training log, e.g. {"compress/sparsity": 0.41}."""
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resume needs besides `prepare`; flat names, tensors only."""
        ...

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None: ...


class MasterView(Protocol):
    """fp32 masters behind half parameters (precision/loop.py)."""

    def master(self, parameter: nn.Parameter) -> Tensor: ...

    def gradient(self, parameter: nn.Parameter) -> Tensor | None: ...


class Method(Generic[Config]):
    """A method with its settings. A subclass overrides what it does; here nothing is done.

    The same model, settings and tools give the same bits. Methods raise UserError and its kinds, naming the field.
    """

    order: ClassVar[int]

    def __init__(self, config: Config) -> None:
        self.config = config

    @classmethod
    def check(cls, config: Config, skeleton: nn.Module, site: Site) -> None:
        """Raises UserError for settings that cannot be meant for this model. skeleton: on the meta device."""

    @classmethod
    def check_processor(cls, config: Config, processor: Any) -> None:
        """Raises UserError for a tokenizer, or other processor, that it cannot act on."""

    @classmethod
    def check_steps(cls, config: Config, steps: int, steps_per_epoch: int) -> None:
        """Raises UserError for a phase that has too few optimizer steps for it."""

    @classmethod
    def outlook(cls, config: Config, skeleton: nn.Module, sizes: Sizes) -> Sizes:
        """sizes: of the model as the stage gets it."""
        return sizes

    @classmethod
    def seconds(cls, config: Config, skeleton: nn.Module, tokens: int, macs_per_second: float) -> float:
        """Of a phase without training, with calibration data of so many tokens, within about a factor of two."""
        return 30.0

    def still(self, model: nn.Module) -> list[nn.Parameter]:
        """Parameters that no phase of its stage trains, in those after it was finalized too."""
        return []

    def prepare(self, model: nn.Module, tools: Tools) -> nn.Module:
        """The model to train, or to finalize at once; it may be another object."""
        return model

    def training(self) -> TrainingMethod | None:
        """What acts in the steps of the phase, after `prepare`."""
        return None

    def finalize(self, model: nn.Module, tools: Tools) -> nn.Module:
        """The model of the next phase. model: on the CPU, as training left it."""
        return model

    def processor(self) -> Any:
        """What goes with the model from `finalize` on in place of the processor that came with it; None: that stays."""
        return None

    def save(self, folder: Path) -> None:
        """What goes beside the saved model; after `finalize`, by one process."""

    def facts(self) -> dict[str, Any]:
        """What it did, after `finalize`, in JSON types. `structure` and `compressed` have tables in the report."""
        return {}
