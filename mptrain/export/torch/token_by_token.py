"""Whether a decoder with a cache computes token by token what the model does, before it is called done."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mptrain.core.errors import ExportError
from mptrain.core.signature import BATCH, Port, Signature
from mptrain.export.torch.cached_decoder import CHECKED
from mptrain.export.torch.decoding import BEAM
from mptrain.verify import parity

CALL = Signature(
    (Port("input_ids", (BATCH, "tokens"), "int64"), Port("attention_mask", (BATCH, "tokens"), "int64")),
    (Port("logits", (BATCH, "tokens", "vocabulary")),),
)
"""of whole texts"""
EXACT, ROUGH = 1e-4, 0.5
"""relative differences that are let pass: in float32, and where activations are rounded to 8 bits, which the last digit
of a float decides (0.07 to 0.12 in SmolLM2-135M); a cache that is not read or reordered makes them about 1"""


class Decoder(Protocol):
    """A runner with a cache: a call is whole texts from an empty cache on, a step goes on with the one before."""

    inputs: Any
    """names of what the file takes"""
    max_length: int | None

    def __call__(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]: ...

    def reset(self) -> None: ...

    def step(self, batch: Mapping[str, Tensor | np.ndarray]) -> dict[str, np.ndarray]: ...


def check(runner: Decoder, model: nn.Module, *, runtime: str, exact: bool) -> None:
    """Feed made-up texts token by token. One row is padded on the left, one on the right; halfway rows change places.

    exact: the logits of both, whole texts and token by token, must be the model's; else, the one those of the other.
    runtime: named in messages. Raises ExportError.
    """
    tokens, config = min(runner.max_length or CHECKED, CHECKED), cast(PreTrainedModel, model).config.get_text_config()
    ids = (7 * torch.arange(3 * tokens) + 1).reshape(3, tokens) % config.vocab_size
    mask = torch.ones_like(ids)
    mask[1, : tokens // 3], mask[2, tokens - tokens // 3 :] = 0, 0
    batch = {"input_ids": ids, "attention_mask": mask}
    if "position_ids" in runner.inputs:
        batch["position_ids"] = torch.where(mask == 0, 1, mask.cumsum(1) - 1)
    try:
        steps = _token_by_token(runner, ids, mask)
        of_tokens = set(steps) == {"logits"}  # heads see the last token alone
        whole = runner(batch) if of_tokens else _prefixes(runner, batch)
    except ExportError as error:
        said = str(error).rstrip(".")
        raise ExportError(
            f"an export with a cache: {runtime} cannot run {type(model).__name__} token by token ({said}); export it"
            " without a cache"
        ) from error
    kept, found = mask.bool().numpy(), {}
    for name in (name for name, value in whole.items() if value.dtype.kind == "f"):
        values, apart = whole[name][kept], (whole[name] - steps[name])[kept]
        found[f"as a whole ({name})"] = float(np.sqrt(np.square(apart).mean()) / values.std())
    if exact and of_tokens:
        # with the noise of float32 left out, as of any export
        found["in torch"] = parity.compare(model, lambda _: steps, [batch], signature=CALL)["relative"]
    for how, difference in found.items():
        if not difference <= (EXACT if exact else ROUGH):
            raise ExportError(
                f"an export with a cache: {type(model).__name__} gives other outputs token by token than {how}, by"
                f" {difference:.2g} of their size; export it without a cache"
            )


def _prefixes(runner: Decoder, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    """Outputs [rows, tokens, …] of heads: of each text up to each of its tokens."""
    length = batch["input_ids"].shape[1]
    found = [runner({name: value[:, : place + 1] for name, value in batch.items()}) for place in range(length)]
    return {name: np.stack([one[name] for one in found], 1) for name in found[0]}


def _token_by_token(runner: Decoder, ids: Tensor, mask: Tensor) -> dict[str, np.ndarray]:
    """Outputs [rows, tokens, …], each row where it stands in ids."""
    runner.reset()
    order, found = np.arange(len(ids)), []
    for place in range(ids.shape[1]):
        beams = np.roll(np.arange(len(ids)), 1) if place == ids.shape[1] // 2 else np.arange(len(ids))
        order = order[beams]
        part = {"input_ids": ids[order, place : place + 1], "attention_mask": mask[order, : place + 1]}
        outputs = runner.step({**part, BEAM: beams.astype(np.int32)})
        found.append({name: value[np.argsort(order)] for name, value in outputs.items()})
    joined = np.concatenate if set(found[0]) == {"logits"} else np.stack
    return {name: joined([one[name] for one in found], 1) for name in found[0]}
