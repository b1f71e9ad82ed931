"""packaged:shapes: 8,000 pictures of 500 made-up things, 24 x 24 pixels, drawn by a fixed seed.

    image    PNG, RGB       shape   one of ten: disc, triangle, …       thing   which of the things: thing-017

A thing has a shape, two colours, a proportion and a stripe; it is seen 16 times, moved, turned, scaled, lit and
covered anew, with noise. So `shape` is for classification, and `thing` for retrieval: what was seen before. Splits
keep things apart (`group` of the source), so a test is of things that training has not seen.

A shape is what lies inside a radius r(θ) around its middle; of a regular polygon of n corners

    r(θ) = cos(π/n) / cos((θ mod 2π/n) − π/n)

of a star less towards the middle of an edge; hollow where a smaller copy is left out.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.parquet
from PIL import Image

VERSION = 1
SOURCE = None
GROUP = "thing"
FILE = "pictures.parquet"
THINGS, VIEWS, SIDE = 500, 16, 24
_SAMPLES = 2  # of a pixel, each way: edges are smooth
_NOISE = 0.09  # of the whole range

Inside = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""x, y in shape coordinates to whether they are inside, bool"""


def _polygon(corners: int, hollow: float = 0.0, deep: float = 0.0) -> Inside:
    """hollow: the size of the hole. deep: 0, edges are straight; nearer to 1, they bend in, as of a star."""

    def inside(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        part = 2 * np.pi / corners
        turn = np.mod(np.arctan2(y, x), part) - part / 2
        edge = np.cos(np.pi / corners) / np.cos(turn)
        edge = edge - deep * (1 - 2 * np.abs(turn) / part) * edge
        radius = np.hypot(x, y)
        return (radius < edge) & (radius >= hollow * edge)

    return inside


def _cross(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    x, y = np.abs(x), np.abs(y)
    return (np.minimum(x, y) < 0.3) & (np.maximum(x, y) < 0.95)


def _half(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.hypot(x, y) < 1) & (x > 0)


def _crescent(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return (np.hypot(x, y) < 1) & (np.hypot(x - 0.45, y) > 0.75)


SHAPES: dict[str, Inside] = {
    "disc": _polygon(48),
    "triangle": _polygon(3),
    "square": _polygon(4),
    "hexagon": _polygon(6),
    "half": _half,
    "star": _polygon(5, deep=0.45),
    "ring": _polygon(48, hollow=0.6),
    "frame": _polygon(4, hollow=0.6),
    "cross": _cross,
    "crescent": _crescent,
}


def make(source: Path | None, folder: Path) -> None:
    """Write pictures.parquet into `folder`."""
    images, shapes, things = zip(*rows())
    table = pyarrow.table({"image": [png(image) for image in images], "shape": shapes, GROUP: things})
    pyarrow.parquet.write_table(table, folder / FILE)


def png(image: np.ndarray) -> bytes:
    """image: uint8 [height, width, 3]."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, "png")
    return file.getvalue()


def rows() -> Iterator[tuple[np.ndarray, str, str]]:
    """(picture uint8 [24, 24, 3], shape, thing) of each row."""
    draw, names = np.random.default_rng(0), list(SHAPES)
    for number in range(THINGS):
        shape = names[number % len(names)]
        colours = draw.uniform(0.5, 0.95, (2, 3))
        colours[1] -= 0.45  # darker than what is before it
        long, stripe = draw.uniform(0.7, 1.0), draw.uniform(0, 2 * np.pi)
        for _ in range(VIEWS):
            yield _view(draw, SHAPES[shape], colours, long, stripe), shape, f"thing-{number:03}"


def _view(draw: np.random.Generator, inside: Inside, colours: np.ndarray, long: float, stripe: float) -> np.ndarray:
    count = SIDE * _SAMPLES
    at = (np.arange(count) + 0.5) / count * 2 - 1
    turn, size = draw.uniform(0, 2 * np.pi), draw.uniform(0.55, 0.85)
    x, y = np.meshgrid(at - draw.uniform(-0.2, 0.2), at - draw.uniform(-0.2, 0.2))
    u, v = (np.cos(turn) * x + np.sin(turn) * y) / size, (np.cos(turn) * y - np.sin(turn) * x) / size / long
    shaded = 0.9 + 0.1 * np.sign(np.sin(5 * (u * np.cos(stripe) + v * np.sin(stripe))))
    drawn = np.where(inside(u, v)[..., None], colours[0] * shaded[..., None], colours[1])
    left, top = draw.uniform(-1.6, 1.6, 2)
    drawn[(np.abs(x - left) < 0.08) | (np.abs(y - top) < 0.04)] = draw.uniform(0, 1)
    small = drawn.reshape(SIDE, _SAMPLES, SIDE, _SAMPLES, 3).mean((1, 3))
    lit = small * draw.uniform(0.75, 1.1) + draw.normal(0, _NOISE, small.shape)
    return np.round(255 * lit.clip(0, 1)).astype(np.uint8)
