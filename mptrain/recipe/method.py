"""What the settings of a method say before there is a model: `prune`, `quantize` and `palettize` of a stage.

The other half, what is done to a model, is `compress/base.py`; `compress/methods.py` joins the two. Settings of a
package outside are made known by `mptrain.extend.register_method`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from mptrain.recipe.base import Strict

Need = Literal["inputs", "labels"]
Reads = Literal["target", "bytes", "widths"]


@dataclass(frozen=True)
class Weights:
    """Compressed weights as a stage leaves them.

    kind: integers with scales, or indices into tables. per: what shares a scale or table. activations: fake
    quantizers stand on the inputs of the layers. vectors: an index stands for several weights. row_scale: a scale to
    each row on top of the tables. kernels: of convolutions, whose rows go through channels and kernel.
    """

    kind: Literal["integers", "tables"]
    bits: int
    per: Literal["tensor", "row", "block", "group"] = "row"
    activations: bool = False
    vectors: bool = False
    row_scale: bool = False
    kernels: bool = False

    @property
    def saturates(self) -> bool:
        """Whether two products with 8-bit activations can exceed 16 bits, which x86 CPUs without VNNI add them in."""
        return self.activations and self.bits > 7


WHOLE = "act on whole weight matrices, and FSDP2 shards them: launch with DDP (mptrain copy accelerate-ddp-2gpu)"


class MethodConfig(Strict):
    """Settings of a method. A subclass has the field that `by` names, a Literal, and below what differs from here."""

    field: ClassVar[str]
    """the field of a stage that holds them: prune, quantize or palettize"""
    by: ClassVar[str]
    """the field of the settings that tells the methods of one field apart"""
    tag: ClassVar[str]
    """what it is called on a model card"""
    packages: ClassVar[tuple[str, ...]] = ()
    """what it imports beside what mptrain requires; a missing one is said before training"""
    alone: ClassVar[bool] = False
    """goes in a stage without train and prune"""
    freezes: ClassVar[bool] = False
    """parameters of its own train in place of the model's: no other method may act in the training of its stage"""
    reshapes: ClassVar[bool] = False
    """shapes of weights change where it is finalized"""
    rewrites: ClassVar[bool] = False
    """the tokenizer changes with the model: what comes after reads its texts anew"""
    last: ClassVar[bool] = False
    """it stores weights as they will be shipped: no later stage may change them"""
    again: ClassVar[bool] = False
    """but a later stage may apply a method of the same field, which forgets what this one stored"""

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """Those that the field `by` may have."""
        return get_args(cls.model_fields[cls.by].annotation)

    @property
    def name(self) -> str:
        return str(getattr(self, self.by))

    def words(self) -> str:
        """A few words for report and card."""
        return f"{self.name} {self.tag}"

    def leaves(self) -> Iterator[tuple[str, Weights]]:
        """The kinds of compressed weights that it leaves, each with the field that asks for it; exports are asked
        whether they hold them, and have precisions that go with them."""
        yield from ()

    def needs(self) -> frozenset[Need]:
        """Data to calibrate on: model inputs, batches with labels."""
        return frozenset()

    def reads(self) -> frozenset[Reads]:
        """What it takes from `evaluate` and `export`: the variant and its runtime that a budget counts, the bytes of
        its weights, bits of tables that targets store."""
        return frozenset()

    def early(self) -> bool:
        """In a stage that prunes: whether it acts from the start of the stage on, or from the boundary on."""
        return False

    def why_alone(self) -> str:
        """How it is said that it goes in a stage without train and prune; empty where it does not."""
        return "goes in a stage of its own, without train and prune" if self.alone else ""

    def why_train(self) -> str:
        """Why it needs `train`, and the way out; empty where it does without."""
        return ""

    def why_not_widths(self, multiple: int) -> str:
        """Why it cannot act on layers whose widths pruning in the same stage leaves at multiples of so many, and the
        way out; empty where it can."""
        return ""

    def empties(self) -> bool:
        """Whether it may leave an attention or FFN no units at all."""
        return False

    def why_not_sharded(self) -> str:
        """Field and reason why it cannot act in training on parameters that FSDP2 shards; empty where it can."""
        return ""

    def why_not_split(self) -> str:
        """Field and reason why it cannot act in training with `precision.master: split`; empty where it can."""
        return ""
