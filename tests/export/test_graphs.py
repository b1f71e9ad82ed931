"""Parts of models that converters of exported graphs take for something else, in every format and at other sizes."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch
from torch import nn
from transformers.utils.import_utils import torch_compilable_check

from mptrain.core.errors import ExportError
from mptrain.core.signature import probed
from mptrain.export.base import Source
from mptrain.export.formats import FORMATS, format_of
from mptrain.recipe import EXPORTS
from mptrain.verify.parity import compare

END = 2


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.table, self.out = nn.Embedding(20, 8), nn.Linear(8, 3)

    def forward(self, input_ids, attention_mask):
        return {"logits": self.out(self.read(self.table(input_ids), input_ids, attention_mask))}


class EndToken(Words):
    """As BART's and T5's classifiers: the ids are shifted, and the state of the one end token is read."""

    def read(self, x, ids, mask):
        shifted = ids.new_zeros(ids.shape)
        shifted[:, 1:] = ids[:, :-1].clone()
        shifted[:, 0] = END
        x = x + self.table(shifted)
        marked = ids.eq(END)
        torch_compilable_check(torch.unique_consecutive(marked.sum(1)).numel() == 1, "other numbers of end tokens")
        return x[marked, :].view(x.shape[0], -1, 8)[:, -1, :]


class SharedHead(Words):
    """As Falcon's attention: four heads of queries, one of keys and values, a mask of two numbers, no scale."""

    def read(self, x, ids, mask):
        query = x.unflatten(-1, (4, 2)).transpose(1, 2)
        key, value = x[..., None, :2].transpose(1, 2), x[..., None, 2:4].transpose(1, 2)
        seen = mask[:, None, None, :].bool().expand(-1, 1, mask.shape[1], -1)
        bias = torch.where(seen, 0.0, -3e4)
        made = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias)
        return made.transpose(1, 2).flatten(2)


class Pooled(Words):
    """As Swin's classifiers."""

    def read(self, x, ids, mask):
        return nn.functional.adaptive_avg_pool1d((x * mask[..., None]).transpose(1, 2), 1).flatten(1)


class Loop(Words):
    """As Mamba: a state that goes from token to token."""

    def read(self, x, ids, mask):
        state, found = torch.zeros_like(x[:, 0]), []
        for token in range(x.shape[1]):
            state = 0.5 * state + x[:, token]
            found.append(state)
        return torch.stack(found, 1) * x


def batch(rows, length, seed=0):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 20, (rows, length), generator=draw)
    mask = torch.ones_like(ids)
    ids[:, -1] = END
    ids[0, length - 2], ids[0, length - 1], mask[0, length - 1] = END, 1, 0
    return {"input_ids": ids, "attention_mask": mask}


def source_and_format(model, name):
    shapes = {"shapes": {"batch": [1, 4], "length": [1, 16]}} if name == "coreml" else {}
    spec = EXPORTS[name].model_validate({"id": "x", "format": name, "of": ["model"], **shapes})
    example = batch(2, 9)
    signature = probed(model, example)
    assert signature.lengths() == ["tokens"]
    return Source(lambda: model, signature, example, "fp32", "fp32", False, lambda: [example]), format_of(spec)


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("kind", [EndToken, SharedHead, Pooled])
def test_parts_of_models_are_right_at_every_size(kind, name, tmp_path):
    model = kind().eval()
    source, form = source_and_format(model, name)
    done = form.write(source, tmp_path)
    others = [batch(2, 9), batch(3, 5, 1), batch(1, 16, 2), batch(4, 4, 3)]
    with closing(form.open(done.path, source)) as runner:
        assert compare(model, runner, others, signature=source.signature)["relative"] < 1e-5


@pytest.mark.parametrize("name", FORMATS)
def test_a_loop_over_the_tokens_is_refused_before_anything_is_written(name, tmp_path):
    source, form = source_and_format(Loop().eval(), name)
    with pytest.raises(ExportError, match=r"forward pass of Loop computes for the sizes of one example .*kind: fixed"):
        form.write(source, tmp_path)
    assert not list(tmp_path.iterdir())
