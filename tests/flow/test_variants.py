"""What a run makes of a variant whose outputs are no numbers."""

import pytest
import torch
from torch import nn

from mptrain.core.errors import NotFinite
from mptrain.core.signature import probed
from mptrain.data.tasks.arrays import finite
from mptrain.export.base import Source
from mptrain.flow.variants import _broken
from mptrain.report import notes
from mptrain.verify import parity


class Divided(nn.Module):
    def forward(self, x):
        return {"logits": x / x.round()}


BATCH = {"x": torch.full((2, 4), 0.2)}


def source(quantized):
    model = Divided()
    return Source(lambda: model, probed(model, BATCH), BATCH, "int8", "fp32", quantized, list)


def test_a_quantized_one_is_not_scored_and_the_report_says_why():
    facts = {"id": "ptq_int8"}
    with _broken(source(True), facts):
        finite(Divided()(**BATCH))
    assert facts["scores"] == [] and "8 values of 8 that are not finite" in facts["unscored"]
    row = {"id": "ptq_int8", "metrics": {}, "runtime": {}, "unscored": facts["unscored"]}
    assert notes._unscored([row]) == [f"ptq_int8 is not scored, and cannot be used. {facts['unscored']}"]


def test_of_others_it_is_an_error():
    with pytest.raises(NotFinite, match="values of the exported model are not finite"), _broken(source(False), {}):
        parity.compare(Divided(), lambda batch: Divided()(**batch), [BATCH])
