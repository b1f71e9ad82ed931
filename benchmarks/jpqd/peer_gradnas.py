"""gradnas of nvidia-modelopt on a BERT; run by benchmarks/jpqd/peers.py with an older transformers on the path.

python peer_gradnas.py DENSE BATCHES.safetensors PARAMS OUT.safetensors
"""

from __future__ import annotations

import sys
from collections import defaultdict

import modelopt.torch.prune as mtp
import torch
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification


def main(dense: str, given: str, params: str, out: str) -> None:
    torch.manual_seed(0)
    model = BertForSequenceClassification.from_pretrained(dense, attn_implementation="eager").eval()
    found: dict[int, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, tensor in load_file(given).items():
        index, _, key = name.partition(".")
        found[int(index)][key] = tensor
    batches = [found[i] for i in sorted(found)]
    inputs = tuple(batches[0][name][:1] for name in ("input_ids", "attention_mask", "token_type_ids"))
    pruned, _ = mtp.prune(
        model,
        mode=[("gradnas", {"nn.Linear": {"*": {"features_ratio": None, "feature_divisor": 8}}})],
        constraints={"params": float(params)},
        dummy_input=inputs,
        config={
            "data_loader": batches,
            "collect_func": lambda batch: (batch,),
            "loss_func": lambda output, batch: output.loss,
            "max_iter_data_loader": len(batches),
        },
    )
    weights = {name: p.detach().contiguous().clone() for name, p in pruned.named_parameters()}
    left = sum(p.numel() for p in weights.values())
    print(f"gradnas left {left:,} of at most {int(params):,} parameters", file=sys.stderr)
    save_file(weights, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
