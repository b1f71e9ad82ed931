"""What an embedding of low rank (`vocabulary: {rank: …}`) costs at once, without training, and what counting buys.

    python -m benchmarks.jpqd.embedding_rank --json benchmarks/results/embedding_rank.json --dense FOLDER

The dense MiniLM of the film reviews (2 epochs, trained here unless --dense names it), all of its tokens, its embedding
of 384 numbers to a token replaced by a product. A row is a rank and what a row of the table counts: `read`, as often as
the training split has the token, as the product has it; `alike`, once. `explained` is the share of the differences, so
counted, that it holds. Scored is the torch model on the test split, which chose nothing; `against_dense` is paired, and
`ahead` is `read` less `alike` of the same rank, paired.
"""

from __future__ import annotations

import argparse
import copy
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks.jpqd.curve import add_dense, dense_of
from benchmarks.jpqd.one_shot import scored
from benchmarks.kit.paired import markdown, write
from mptrain.compress.structure.low_rank import factorize
from mptrain.flow import vocabulary
from mptrain.measure.intervals import paired_difference
from mptrain.models import artifact

RANKS = (192, 128, 96, 64, 32)
ALIKE = (128, 64)


def percent(change: list[float]) -> str:
    value, low, high = (100 * x for x in change)
    return f"{value:+.1f} ({low:+.1f} … {high:+.1f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True)
    add_dense(parser)
    options = parser.parse_args()
    torch.set_num_threads(1)
    folder, task = dense_of(options)
    dense = artifact.load(folder)
    counts = vocabulary.counts(task)
    counts[task.processor.pad_token_id] = 0
    whole = scored(dense, task, "test")
    rows: list[dict[str, Any]] = []
    for rank in RANKS:
        scores = {}
        for kind in ("alike", "read") if rank in ALIKE else ("read",):
            model = copy.deepcopy(dense)
            share = factorize(model, rank, counts if kind == "read" else torch.zeros_like(counts))
            scores[kind] = score = scored(model, task, "test")
            change = paired_difference(score, whole)
            row = {"name": f"{rank}/{kind}", "rank": rank, "counted": kind, "explained": share}
            row |= {"parameters": sum(p.numel() for p in model.get_input_embeddings().parameters())}
            row |= {"accuracy": score.value, "against_dense": [change.value, change.low, change.high]}
            if len(scores) == 2:
                ahead = paired_difference(score, scores["alike"])
                row["ahead"] = [ahead.value, ahead.low, ahead.high]
            rows.append(row)
            print(json.dumps(row), flush=True)
    columns = {
        "name": "rank / counted", "explained": "explained", "accuracy": "accuracy", "lost": "against dense",
        "bought": "read less alike", "millions": "M parameters",
    }  # fmt: skip
    shown = [
        row
        | {"lost": percent(row["against_dense"]), "millions": row["parameters"] / 1e6}
        | {"bought": percent(row["ahead"]) if "ahead" in row else ""}
        for row in rows
    ]
    facts = {
        "dense": {"accuracy": whole.value, "n": whole.n, "parameters": dense.get_input_embeddings().weight.numel()}
    }
    write(options.json, rows, [], markdown(shown, columns), plotted=None, **facts)


if __name__ == "__main__":
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    main()
