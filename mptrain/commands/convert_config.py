"""`mptrain convert-config`: a recipe from the JSON configuration of NNCF 2."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mptrain.core.errors import UserError

HELP = "make a recipe of an NNCF 2 configuration (optimum-intel's OVTrainer)"


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = "Make a recipe of a JSON configuration of NNCF 2, as optimum-intel's OVTrainer took it."
    parser.add_argument("config", metavar="NNCF.JSON", help="the configuration, or its `compression` alone")
    parser.add_argument("--model", required=True, help="the script's model: a folder, packaged:NAME or a hub name")
    parser.add_argument("--task", help="what the model does; default: from its head")
    parser.add_argument("--data", metavar="FILE", help="the training rows (default: train.csv, to be changed)")
    parser.add_argument("--epochs", type=float, help="--num_train_epochs of the script")
    parser.add_argument("--lr", type=float, default=2e-5, help="--learning_rate of the script (default 2e-5)")
    parser.add_argument("--teacher", metavar="MODEL", help="--teacher_model_name_or_path of the script")
    parser.add_argument("--distillation-weight", type=float, default=0.9, help="of the script (default 0.9)")
    parser.add_argument("--distillation-temperature", type=float, default=2.0, help="of the script (default 2)")
    parser.add_argument("--to", metavar="FILE", help="where to write the recipe; default: print it")
    parser.add_argument("--allow-code", action="store_true", help="run code that comes with the model")


def run(options: argparse.Namespace) -> int:
    target = Path(options.to) if options.to else None
    if target is not None and target.exists():
        raise UserError(f"--to {target}: exists already; choose another name.")
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    from mptrain.flow.from_nncf import convert, read

    found = convert(
        read(Path(options.config)),
        model=options.model,
        task=options.task,
        data=options.data,
        epochs=options.epochs,
        lr=options.lr,
        teacher=options.teacher,
        distill=(options.distillation_weight, options.distillation_temperature),
        allow_code=options.allow_code,
    )
    text = found.text(Path(options.config).name)
    if target is None:
        sys.stdout.write(text)
        return 0
    try:
        target.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--to {target}: cannot be written ({error.strerror}). Choose another folder.") from None
    print(f"{target} written, with {len(found.notes)} notes. Next: mptrain recipe {target} --dry-run")
    return 0
