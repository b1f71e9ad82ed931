import numpy as np
import pytest
import torch
from kit.tiny_models import tiny

from mptrain.compress.weights import records
from mptrain.compress.weights.records import Palettized
from mptrain.core.errors import UserError
from mptrain.export.coreai.cached import export_decoder
from mptrain.export.coreai.facts import stored_types
from mptrain.export.coreai.runner import Asset


@pytest.mark.long
@pytest.mark.parametrize("family", ["opt", "llama"])
def test_token_by_token_is_the_whole_text_at_once(family, tmp_path):
    model = tiny(family)
    draw = torch.Generator().manual_seed(1)
    rows, columns = model.lm_head.weight.shape
    table = Palettized(
        torch.randint(0, 16, (rows, columns), generator=draw, dtype=torch.uint8),
        torch.randn(1, 16, 1, generator=draw).half().float() / 8,  # logits of ordinary size
        rows,
        None,
        4,
    )
    records.attach(model, {"lm_head.weight": table})
    done = export_decoder(model, tmp_path / "out", max_length=12)
    runner = Asset(done.asset)
    assert runner.inputs == ["input_ids", "position"] and runner.outputs == ["logits"]
    layers, heads = model.config.num_hidden_layers, {"opt": 4, "llama": 2}[family]
    assert runner.states == {f"{k}_{i}": [1, heads, 12, 8] for i in range(layers) for k in ("key", "value")}
    assert stored_types(done.asset)["UInt4"] == rows * columns // 2
    for _ in range(2):
        text = torch.randint(4, 50, (1, 12), generator=draw)
        steps = [runner({"input_ids": text[:, i : i + 1], "position": torch.tensor([i])})["logits"] for i in range(12)]
        with torch.no_grad():
            expected = model(input_ids=text).logits.numpy()
        assert np.abs(np.concatenate(steps, 1) - expected).max() < 1e-5
        runner.reset()


def test_models_that_do_not_fit(tmp_path):
    with pytest.raises(UserError, match="max_length 41 must be 1 to 40"):
        export_decoder(tiny("llama"), tmp_path / "out", max_length=41)
    with pytest.raises(UserError, match="BertForSequenceClassification"):
        export_decoder(tiny("bert"), tmp_path / "out", max_length=8)
