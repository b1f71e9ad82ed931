"""Pictures as `datasets.Image` and transformers' pipelines read them: the first frame, turned as its EXIF
orientation says, RGB.

    16 bits            white is 65535: round(value / 257)      (Pillow alone would cut at 255, nearly all white)
    32 bits, float     no value is white by definition, so they are refused by name
    transparency       dropped, the colours beneath stay; a palette and CMYK become RGB

Whatever is wrong with a file is found before training, for `check` decodes every picture once.
"""

from __future__ import annotations

import io
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image, ImageOps

from mptrain.core.errors import DataError
from mptrain.core.host import usable_cpus
from mptrain.core.progress import track
from mptrain.data.sources.quoting import hidden, reason
from mptrain.data.sources.tables import Table
from mptrain.data.tasks.media import digest, read_bytes

_WHITE = 65535
_SIXTEEN = ("I;16", "I;16B", "I;16L", "I;16N")


class _Unscaled(Exception):
    """Says why a picture has no white."""


def digests(table: Table, field: str) -> list[str]:
    """sha256 of the encoded content of every cell."""
    return [digest(read_bytes(table, field, row)) for row in range(len(table))]


def read_image(table: Table, field: str, row: int) -> Image.Image:
    """The picture in a cell, RGB. Raises DataError naming the row for one that is broken, too large or of 32 bits."""
    place, content = table.place(field, row), read_bytes(table, field, row)
    try:
        return _decoded(content)
    except _Unscaled as error:
        raise DataError(f"{place} {error}.") from None
    except Image.DecompressionBombError:
        raise DataError(
            f"{place} is a picture of more than {2 * (Image.MAX_IMAGE_PIXELS or 0):,} pixels, too many to be one that a"
            " model should see (PIL.Image.MAX_IMAGE_PIXELS). Make it smaller, or drop the row."
        ) from None
    except Exception as error:  # decoders raise SyntaxError, struct.error, zlib.error, IndexError, MemoryError, …
        raise DataError(f"{place} is not a picture that can be read ({reason(error)}). Repair or drop it.") from (
            None if hidden() else error
        )


def check(table: Table, field: str, split: str) -> None:
    """Decode every picture once. Raises DataError for the first, in the order of the rows, that cannot be read."""
    with warnings.catch_warnings(), ThreadPoolExecutor(usable_cpus()) as pool:
        warnings.simplefilter("ignore")  # remarks about EXIF, and about sizes that still fit
        decoding = pool.map(lambda row: read_image(table, field, row).size, range(len(table)))
        try:
            for _ in track(decoding, f"reading {split} pictures", len(table)):
                pass
        finally:
            pool.shutdown(cancel_futures=True)


def _decoded(content: bytes) -> Image.Image:
    stored = Image.open(io.BytesIO(content))
    stored.load()
    # Portable grey maps of more than 8 bits arrive in 32, scaled to 65535.
    sixteen = stored.mode in _SIXTEEN or (stored.mode == "I" and stored.format == "PPM")
    if not sixteen and stored.mode in ("I", "F"):
        raise _Unscaled(
            f"has {'whole numbers of 32 bits' if stored.mode == 'I' else 'floating-point numbers'} for pixels, of which"
            " none is white by definition. Save it with 8 or 16 bits, all pictures scaled alike"
        )
    turned = ImageOps.exif_transpose(stored)
    if sixteen:
        values = np.asarray(turned).astype(np.int64).clip(0, _WHITE)
        turned = Image.fromarray(((values * 255 + _WHITE // 2) // _WHITE).astype(np.uint8))
    return turned.convert("RGB")
