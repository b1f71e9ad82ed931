"""The rows of the pruned language model: recipes that are valid, equal training for all, and its verdict."""

import pytest

from benchmarks.llm import prune
from mptrain.recipe import Recipe


@pytest.mark.parametrize("row", prune.ROWS)
def test_every_row_is_a_recipe(row, tmp_path):
    found = Recipe.model_validate(prune.recipe(row, tmp_path, windows=1000))
    stages = {stage.id: stage for stage in found.stages}
    structure, weights = row.split("/")
    assert ("small" in stages) == structure.startswith("pruned")
    assert found.model.path.endswith(f"{structure}/model") == structure.startswith("shallow")
    last = stages["int4"]
    if weights == "trained":
        assert last.teacher == prune.MODEL and last.train.epochs * 1000 == prune.STEPS * prune.BATCH
        assert last.quantize.finetune is not None and last.quantize.block_size == 64
    elif weights == "gptq":
        assert last.train is None and last.quantize.method == "gptq" and last.quantize.block_size == 64
    assert found.export[0].cache == prune.CACHE


def test_a_bar_is_met_only_by_what_an_interval_tells():
    trained = {"pruned-70/gptq": [-0.3, -0.31, -0.29], "shallow-70/trained": [-0.1, -0.2, 0.01]}
    rows = {
        "pruned-70/trained": {"over": [0.1, 0.09, 0.11], "against": trained},
        "shallow-70/trained": {"over": [0.2, 0.1, 0.3], "against": {}},
    }
    assert [met for _, met in prune.bars(rows)] == [False, True, False]
