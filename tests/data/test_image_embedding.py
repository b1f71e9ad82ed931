"""Pictures that belong together: batches of partners, the loss, the search."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.functional import cross_entropy
from transformers import ViTImageProcessorPil

from mptrain.core.errors import DataError
from mptrain.data.load import load_data
from mptrain.recipe import Data


def picture(draw):
    file = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(file, "png")
    return file.getvalue()


def load(tmp_path, names, **fields):
    import pandas

    draw = np.random.default_rng(0)
    pandas.DataFrame({"image": [picture(draw) for _ in names], "label": names}).to_parquet(tmp_path / "train.parquet")
    processor = ViTImageProcessorPil(size={"height": 8, "width": 8})
    return load_data(Data(train=str(tmp_path / "train.parquet"), **fields), "image-embedding", processor, seed=0)


@pytest.fixture
def task(tmp_path):
    return load(tmp_path, [f"thing {number % 6}" for number in range(60)])


def test_a_batch_of_training_has_a_partner_to_each(task):
    batch = task.collate([task.train[index] for index in range(5)])
    assert batch["pixel_values"].shape == (10, 3, 8, 8) and batch["labels"].shape == (10,)
    assert torch.equal(batch["labels"][:5], batch["labels"][5:])
    assert not any(torch.equal(a, b) for a, b in zip(*batch["pixel_values"].chunk(2)))
    held_out = task.collate([task.validation[index] for index in range(3)])
    assert held_out["pixel_values"].shape == (3, 3, 8, 8) and task.example(2, 1)["pixel_values"].shape == (2, 3, 8, 8)


def test_the_loss_is_a_softmax_over_partners_of_other_things(task):
    batch = task.collate([task.train[index] for index in range(6)])
    vectors = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
    unit, labels, rows = vectors / vectors.norm(dim=1, keepdim=True), batch["labels"], []
    for query in range(6):
        others = [query, *(j for j in range(6) if labels[j] != labels[query])]
        rows.append(cross_entropy(20 * (unit[query] @ unit[6:][others].T)[None], torch.tensor([0])))
    torch.testing.assert_close(task.loss({"embedding": vectors}, batch), torch.stack(rows).mean())


def test_scores_are_those_of_a_search_among_all_others(task):
    names = [int(task.test[index]["labels"]) for index in range(len(task.test))]
    vectors = np.random.default_rng(1).standard_normal((len(names), 3)).astype(np.float32)
    unit, hits = vectors / np.linalg.norm(vectors, axis=1, keepdims=True), []
    for query, name in enumerate(names):
        if names.count(name) > 1:
            order = sorted((j for j in range(len(names)) if j != query), key=lambda j: -float(unit[query] @ unit[j]))
            hits.append(names[order[0]] == name)
    read = task.read({"embedding": vectors}, {}, "test", range(len(names)))
    found = {score.name: score.value for score in task.score("test", read)}
    assert found["recall@1"] == pytest.approx(np.mean(hits)) and next(iter(found)) == "ndcg@10"


def test_models_agree_where_they_order_pictures_alike(task):
    vectors = torch.randn(8, 4)
    assert (task.agreement({"embedding": vectors}, {"embedding": 3 * vectors.numpy()}, {}) == 1).all()
    assert task.agreement({"embedding": vectors}, {"embedding": torch.randn(8, 4)}, {}).mean() < 0.9


def test_many_groups_never_cross_splits_and_a_lonely_picture_is_refused(tmp_path):
    task = load(tmp_path, [f"thing {number % 60}" for number in range(240)])
    assert task.facts["groups"]["crossing"] == 0
    with pytest.raises(DataError, match="the group 'alone' has no other picture in the training split"):
        load(
            tmp_path,
            ["alone", *(f"thing {number % 3}" for number in range(40))],
            split={"validation": 0.01, "test": 0.01},
        )
