"""The made-up pictures: the same every time, drawn as their formulas say, with things that stay in one split."""

from __future__ import annotations

import hashlib
from itertools import islice

import numpy as np

from mptrain.data.sources import packaged, packaged_shapes
from mptrain.data.sources.packaged_shapes import SHAPES, SIDE, VIEWS, rows
from mptrain.data.sources.read import read_source
from mptrain.recipe import Data


def test_the_seed_draws_the_same_pictures_again():
    first, again = (list(islice(rows(), 2 * VIEWS)) for _ in range(2))
    assert all(np.array_equal(a[0], b[0]) and a[1:] == b[1:] for a, b in zip(first, again))
    assert {row[1:] for row in first} == {("disc", "thing-000"), ("triangle", "thing-001")}
    assert first[0][0].shape == (SIDE, SIDE, 3) and first[0][0].dtype == np.uint8
    assert len({hashlib.sha256(row[0].tobytes()).digest() for row in first}) == 2 * VIEWS


def test_shapes_have_the_areas_of_geometry():
    at = np.linspace(-1, 1, 1201)
    x, y = np.meshgrid(at, at)
    found = {name: inside(x, y).mean() * 4 for name, inside in SHAPES.items()}
    expected = {
        "disc": np.pi,
        "triangle": 3 * np.sqrt(3) / 4,
        "square": 2.0,
        "hexagon": 6 * np.sqrt(3) / 4,
        "half": np.pi / 2,
        "ring": np.pi * (1 - 0.6**2),
        "frame": 2 * (1 - 0.6**2),
        "cross": 4 * 2 * 0.3 * 0.95 - 4 * 0.3**2,
    }
    assert {name: round(found[name], 1) for name in expected} == {n: round(a, 1) for n, a in expected.items()}
    assert found["star"] < 0.75 * 5 / 2 * np.sin(2 * np.pi / 5)  # of the pentagon with its corners


def test_the_source_keeps_views_of_a_thing_together(tmp_path, monkeypatch):
    monkeypatch.setenv("MPTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(packaged_shapes, "THINGS", 20)
    source = read_source(Data(source="packaged:shapes"), ["image", "shape"])
    table = source.tables["train"]
    assert source.group == "thing" and len(table) == 20 * VIEWS and set(table["shape"]) == set(SHAPES)
    assert table["image"][0].startswith(b"\x89PNG") and packaged.cached("packaged:shapes") is not None
