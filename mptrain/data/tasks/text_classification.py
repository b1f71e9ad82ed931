"""Classes of a text or of a pair of texts."""

from __future__ import annotations

from mptrain.data.tasks.classification import Classification
from mptrain.data.tasks.floor import tfidf_classifier
from mptrain.data.tasks.metrics import Score
from mptrain.data.tasks.text_task import TextTask
from mptrain.recipe import TASKS


class TextClassification(Classification, TextTask):
    kind = TASKS["text-classification"]

    def floor(self, seed: int) -> Score | None:
        return tfidf_classifier(self.texts, seed)
