"""How a key-value cache is written in a Core ML program.

A cache is a state, which Core ML holds in float16. transformers writes new keys and values by index_copy, at
places that follow each other, so it becomes a slice of the state updated in place:

    read_state → slice_update(position … position + tokens, float16) → write_state → attention reads the state
"""

from __future__ import annotations

from typing import Any

from coremltools.converters.mil import Builder as mb
from coremltools.converters.mil.frontend.torch import ops

from mptrain.core.errors import ExportError


def index_copy(context: Any, node: Any) -> None:
    """cache [1, heads, max_length, size], axis 2, places [n] in a row, new [1, heads, n, size]."""
    cache, axis, places, new = ops._get_inputs(context, node, expected=4)
    if node.inputs[0] not in context.name_to_source_state or axis.val != 2 or cache.rank != 4:
        raise ExportError(f"{node.name}: index_copy is converted for key-value caches only")
    first = mb.slice_by_index(x=places, begin=[0], end=[1])
    others = [True, True, False, True]
    updated = mb.slice_update(
        x=mb.cast(x=cache, dtype="fp16"),
        update=mb.cast(x=new, dtype="fp16"),
        begin=mb.concat(values=[[0, 0], first, [0]], axis=0),
        end=mb.concat(values=[[0, 0], mb.add(x=first, y=mb.shape(x=places)), [0]], axis=0),
        begin_mask=others,
        end_mask=others,
    )
    context.add(mb.cast(x=updated, dtype="fp32", name=node.name))
