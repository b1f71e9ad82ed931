"""What is known of an export format before anything heavy is imported: `ExportSpec`, the static half of a format.

A format is one file here, a subclass with the fields of its entry in a recipe, and one folder in mptrain/export, the
`Format` that writes and opens files. Plan, preflight, dry run, stages, gates, report and card ask the spec; none of
them knows a format by name. tests/contract/test_formats.py holds both halves to each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from typing import Annotated, ClassVar, Literal, Self, get_args

from pydantic import Field, model_validator

from mptrain.core.errors import UserError
from mptrain.recipe.base import Name, Strict
from mptrain.recipe.exports.heads import Heads
from mptrain.recipe.method import Weights
from mptrain.recipe.stage import Stage

OF = "stage ids; 'model': the model as it was given, which is then the baseline (else the first stage is)"
Cache = Annotated[int, Field(gt=0)] | None
BYTES = {"fp32": 4.0, "fp16": 2.0}


@dataclass(frozen=True)
class Package:
    """name: on PyPI. module: that is imported. tested: the versions our use of it was tested with, as pip reads them;
    others are refused, for they fail late. needed: False for what only users of the exported model install, by an
    extra of its own that is called as it begins.
    """

    name: str
    module: str
    tested: str
    needed: bool = True


@dataclass(frozen=True)
class Limit:
    """The longest input that an exported model reads. field: of the export that says so."""

    field: str
    tokens: int


@dataclass(frozen=True)
class Stored:
    """What a format makes of compressed weights: stored, the very integers or tables; expanded, the values are exact
    and the size is not; refused, an error says why, before training.
    """

    result: Literal["stored", "expanded", "refused"]
    how: str


@dataclass(frozen=True)
class Use:
    """What the lines that load an exported model are made from; names of transformers and optimum classes.

    path: the model file or package; folder: around it, with config.json and the processor's files. All as they are
    seen from the folder of the run.
    """

    path: str
    folder: str
    pipeline: str | None
    """None where transformers has none for the task"""
    processor: str | None
    """None for a model that takes numbers as they are"""
    optimum: str | None
    """None where it has no class for the task"""
    input: str
    """what the processor is called on, as code"""
    cut: int | None = None
    """tokens at which longer texts were cut when the model was scored"""
    cached: bool = False
    """whether it keeps a key-value cache"""
    inference: str = "f32"
    """what its floating-point part computed in when it was measured"""
    heads: bool = False
    """whether it computes more than the model, so that its outputs are no classifier's and no language model's"""

    @property
    def imports(self) -> list[str]:
        """The line that imports the processor, where there is one."""
        return [] if self.processor is None else [f"from transformers import {self.processor}"]

    @property
    def inputs(self) -> list[str]:
        """Lines that make `inputs`, arrays by name; without a processor they are the user's own."""
        if self.processor is None:
            return []
        cut = "" if self.cut is None else f", truncation=True, max_length={self.cut}"
        return [
            f"processor = {self.processor}.from_pretrained({self.folder!r})",
            f'inputs = processor({self.input}{cut}, return_tensors="np")',
        ]


class ExportSpec(Strict):
    """An entry of a recipe's `export`. A subclass gives `format: Literal[name]`, its fields, and what follows."""

    title: ClassVar[str] = "another format"
    """as its makers write it: "Core ML" """
    extra: ClassVar[str] = ""
    """of mptrain, that installs what it needs"""
    packages: ClassVar[tuple[Package, ...]] = ()
    ending: ClassVar[str] = ""
    """of the name of its file or package: ".onnx" """
    library: ClassVar[str] = ""
    """`library_name` and tag of a model card"""
    timed: ClassVar[bool] = True
    """whether the time of its runner here says something about the runtime the format is for"""
    heads_cached: ClassVar[bool] = False
    """whether an export with a cache may have heads"""
    streams: ClassVar[bool] = False
    """whether its runtime keeps several requests in flight here, for `evaluate.latency.throughput`"""
    checks: ClassVar[frozenset[str]] = frozenset()
    """gates beside those of numbers, size and speed that its facts can answer, e.g. fused_attention"""
    foresees: ClassVar[Literal["all", "own"] | None] = None
    """of which models its `Format` says before any training what it cannot convert, by `check`: all, or those of a
    user's own code; None: it has no `check`"""
    caches: ClassVar[Literal["float16", "float32"] | None] = None
    """type of its key-value cache; None: it keeps none"""

    generates: ClassVar[bool] = False
    """whether its runner with a cache is a `mptrain.measure.generation.Decoder`, whose times say something"""

    id: Name
    format: str
    of: list[str] = Field(description=OF)
    precision: Sequence[str]
    cache: Cache = Field(
        None, description="causal-lm: generate with a key-value cache of so many tokens, where the format keeps one"
    )
    heads: Heads = Field([], description="computed after the model, in the exported graph, in this order")

    @model_validator(mode="after")
    def _heads_with_cache(self):
        if self.heads and self.cache is not None and not self.heads_cached:
            raise ValueError(f"heads: with cache {self.title} is written without heads here; drop one of them")
        return self

    @model_validator(mode="after")
    def _caches(self):
        if self.cache is not None and self.caches is None:
            raise ValueError(f"cache: {self.title} is written without a cache here; drop it, or choose another format")
        return self

    # -- which variants there are

    def precisions(self, stage: Stage) -> tuple[str, ...]:
        """Those that a stage can have."""
        return ("fp32", "fp16")

    def usual(self, stage: Stage) -> str:
        """Of those, the one for somebody who said how weights are compressed and no more."""
        return self.precisions(stage)[0]

    def drops_quantizers(self, precision: str) -> bool:
        """Whether a quantized stage is written without what its fake quantizers learned: its structure alone."""
        return False

    def variant(self, stage: str, precision: str) -> str:
        """The id of a variant of the stage of that name."""
        return f"{stage}_{self.id}_{precision}"

    # -- what it takes and stores

    def longest(self) -> Limit | None:
        """None where inputs may have any length."""
        return None if self.cache is None else Limit("cache", self.cache)

    def sized(self, length: int, free: bool) -> Self:
        """The entry for inputs of up to `length`, or of exactly so many where the length is not `free`, for a model
        that no recipe's data describe. Sizes that the entry names stay."""
        return self

    def widths(self) -> frozenset[int]:
        """Bits of an index that it has tables for; a stage learns no others. An expanded table may have any."""
        return frozenset(range(1, 9))

    def stores(self, weights: Weights) -> Stored:
        raise NotImplementedError

    def expands(self, stage: Stage) -> bool:
        """Whether compressed weights of the stage are written out as the numbers they stand for."""
        return any(self.stores(weights).result == "expanded" for _, weights in stage.leaves())

    def bytes_per_weight(self, precision: str, learned: tuple[float | None, float | None]) -> tuple[float, float]:
        """Of a layer, and of an embedding, for plans. learned: as methods store them; None, as floats."""
        floats = BYTES.get(precision, 4.0)
        layer, embedding = (floats if bytes_ is None else bytes_ for bytes_ in learned)
        return layer, embedding

    def targets(self) -> list[tuple[str, ExportSpec]]:
        """What a table of compressions has a column for: variants of this entry that store differently, by title."""
        return [(self.title, self)]

    # -- around it

    @classmethod
    def name(cls) -> str:
        """Of the format, as recipes write it."""
        return get_args(cls.model_fields["format"].annotation)[0]

    @classmethod
    def check_installed(cls) -> None:
        """Raises ModuleNotFoundError for a package that is missing, UserError for a version that was not tested."""
        for package in cls.packages:
            if not package.needed:
                continue
            if find_spec(package.module) is None:
                raise ModuleNotFoundError(f"No module named {package.module!r}", name=package.module)
            check_version(package, cls.title)

    @classmethod
    def loading(cls, use: Use) -> list[str]:
        """Lines of Python that load a variant and run it, for its model card."""
        return []


def check_version(package: Package, purpose: str) -> None:
    """Raises UserError for an installed version that was not tested."""
    from packaging.specifiers import SpecifierSet

    try:
        version = metadata.version(package.name)
    except metadata.PackageNotFoundError:  # on the path without its metadata: nothing to compare
        return
    if not SpecifierSet(package.tested, prereleases=True).contains(version):
        raise UserError(
            f"export to {purpose} is made for {package.name} {package.tested}, {version} is installed:"
            f" pip install '{package.name}{package.tested}'"
        )
