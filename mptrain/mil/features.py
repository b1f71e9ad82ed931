"""What a package takes: arrays of one size, of a range or of a list of sizes, and pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

_MOST = 2**31 - 1  # of an axis without a bound

Bounds = tuple[tuple[int, int], ...]
Shapes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Feature:
    """An input of the package. shapes: the enumerated ones, or None; bounds: (lowest, highest) per axis.

    picture: the layout of its colours ("RGB", "BGR", "GRAYSCALE"), None for an array. The program reads a picture as
    an array [1, channels, height, width] of its pixels, 0 to 255.
    """

    name: str
    dtype: str
    bounds: Bounds
    shapes: Shapes | None = None
    picture: str | None = None

    def accepts(self, shape: tuple[int, ...]) -> bool:
        if self.shapes is not None:
            return shape in self.shapes
        return len(shape) == len(self.bounds) and all(lo <= n <= hi for n, (lo, hi) in zip(shape, self.bounds))

    def __str__(self) -> str:
        axes = [str(lo) if lo == hi else f"{lo}..{hi}" for lo, hi in self.bounds]
        shown = " or ".join(str(list(s)) for s in self.shapes) if self.shapes else f"[{', '.join(axes)}]"
        return f"{self.name}: {f'picture {self.picture}' if self.picture else self.dtype.lower()} {shown}"


def feature(name: str, dtype: str, shape: Sequence[int | None], described: Any) -> Feature:
    """shape: in the program, None where it is flexible. described: the type in the package's description, or None."""
    bounds = tuple((1, _MOST) if n is None else (n, n) for n in shape)
    kind = None if described is None else described.WhichOneof("Type")
    if kind == "multiArrayType":
        return Feature(name, dtype, *_array(described.multiArrayType, bounds))
    if kind == "imageType":
        image = described.imageType
        colours = type(image).ColorSpace.Name(image.colorSpace)
        return Feature(name, dtype, *_picture(image, bounds), colours)
    return Feature(name, dtype, bounds)


def _array(described: Any, bounds: Bounds) -> tuple[Bounds, Shapes | None]:
    flexible = described.WhichOneof("ShapeFlexibility")
    if flexible == "enumeratedShapes":
        shapes = tuple(tuple(s.shape) for s in described.enumeratedShapes.shapes)
        return _around(shapes), shapes
    if flexible == "shapeRange":
        return tuple(_range(axis) for axis in described.shapeRange.sizeRanges), None
    return bounds, None


def _picture(described: Any, bounds: Bounds) -> tuple[Bounds, Shapes | None]:
    flexible = described.WhichOneof("SizeFlexibility")
    if flexible == "enumeratedSizes":
        lead = tuple(low for low, _ in bounds[:-2])
        shapes = tuple((*lead, size.height, size.width) for size in described.enumeratedSizes.sizes)
        return _around(shapes), shapes
    if flexible == "imageSizeRange":
        sizes = described.imageSizeRange
        return (*bounds[:-2], _range(sizes.heightRange), _range(sizes.widthRange)), None
    return (*bounds[:-2], (described.height,) * 2, (described.width,) * 2), None


def _around(shapes: Shapes) -> Bounds:
    return tuple((min(axis), max(axis)) for axis in zip(*shapes))


def _range(axis: Any) -> tuple[int, int]:
    return axis.lowerBound, axis.upperBound if axis.upperBound > 0 else _MOST
