"""What compression holds besides the model and its records does not grow with the number of layers."""

import weakref

import pytest
import torch
from kit.tiny_models import inputs, tiny
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mptrain.compress.weights import records, weight_only
from mptrain.compress.weights.palettize import palettize
from mptrain.recipe import Palettize, WeightOnly


class Held(TorchDispatchMode):
    """Bytes of the tensors that were made in here and still exist, and the most there were."""

    def __init__(self):
        super().__init__()
        self.now = self.most = 0
        self.known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in before | self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.freed, storage._cdata, storage.nbytes())
        self.most = max(self.most, self.now)
        return out

    def freed(self, which, size):
        self.known.discard(which)
        self.now -= size


def integers(model):
    config = WeightOnly(mode="weight_only", granularity="channel", embeddings="fp32", lm_head="fp32")
    weight_only.compress(model, config, [inputs("opt", seed=i) for i in range(3)])


def tables(model):
    records.attach(model, palettize(model, Palettize(method="kmeans", group_size=8, embeddings=False, lm_head=False)))


@pytest.mark.parametrize("compress", [integers, tables])
def test_many_layers_take_no_more_than_few(compress):
    working = []
    for layers in (1, 4):
        model = tiny("opt", num_hidden_layers=layers)
        with Held() as held:
            compress(model)
            kept = held.now
        stored = sum(r.dense().numel() for r in records.distinct(records.of(model)).values())
        assert stored <= kept <= 1.6 * stored, "what is left are the records"
        working.append(held.most - kept)
    few, many = working
    assert 0 < many <= 1.05 * few, (few, many)
