"""What the settings of a method say before there is a model: `prune`, `quantize` and `palettize` of a stage.

The other half, what is done to a model, is `compress/base.py`; `compress/methods.py` joins the two. Settings of a
package outside are made known by `mptrain.extend.register_method`.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from mptrain.recipe.base import Strict

Need = Literal["inputs", "labels"]


class MethodConfig(Strict):
    """Settings of a method. A subclass has the field that `by` names, a Literal, and below what differs from here."""

    field: ClassVar[str]
    """the field of a stage that holds them: prune, quantize or palettize"""
    by: ClassVar[str]
    """the field of the settings that tells the methods of one field apart"""
    tag: ClassVar[str]
    """what it is called on a model card"""
    alone: ClassVar[bool] = False
    """goes in a stage without train and prune"""
    reshapes: ClassVar[bool] = False
    """shapes of weights change where it is finalized"""
    last: ClassVar[bool] = False
    """it stores weights as they will be shipped: no later stage may change them"""
    again: ClassVar[bool] = False
    """but a later stage may apply a method of the same field, which forgets what this one stored"""

    @property
    def name(self) -> str:
        return str(getattr(self, self.by))

    def words(self) -> str:
        """A few words for report and card."""
        return f"{self.name} {self.tag}"

    def needs(self) -> frozenset[Need]:
        """Data to calibrate on: model inputs, batches with labels."""
        return frozenset()

    def reads(self) -> frozenset[Literal["threads", "widths"]]:
        """What it takes from `evaluate` and `export`: threads of the latency, bits of tables that targets store."""
        return frozenset()

    def early(self) -> bool:
        """In a stage that prunes: whether it acts from the start of the stage on, or from the boundary on."""
        return False

    def why_train(self) -> str:
        """Why it needs `train`, and the way out; empty where it does without."""
        return ""

    def why_not_split(self) -> str:
        """Field and reason why it cannot act in training with `precision.master: split`; empty where it can."""
        return ""
