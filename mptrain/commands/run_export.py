"""The command line of `mptrain export`; the work is in export.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from mptrain.commands.options import add_head_option, add_model_options, check_model_options, head_item

HELP = "export one model and compare the result with it"


def add(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Export a model, compressed if --precision says so, run the result and compare it with the torch model."
        " To train, prune or measure accuracy: a recipe."
    )
    parser.add_argument("model", metavar="MODEL", help="a model folder (also of a run), packaged:NAME or a hub name")
    parser.add_argument("--to", required=True, metavar="FOLDER", help="where to write; must not exist")
    parser.add_argument("--format", default="openvino", help="a format of a recipe's export (default openvino)")
    parser.add_argument(
        "--precision",
        default="fp32",
        help="as in a recipe's export of that format (default fp32), or compressed first: int8 (weights and"
        " activations, calibrated on --data), int8-weights, int4, palette1 … palette8",
    )
    parser.add_argument("--method", help="int8-weights, int4: rtn, scale or gptq (default gptq with --data, else rtn)")
    parser.add_argument(
        "--group-size", type=int, metavar="N", help="columns (int4) or rows (palette) that share a scale or table"
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="another setting of the compression, as in a recipe: --set symmetric=false (may be repeated)",
    )
    parser.add_argument("--calibration", type=int, default=128, metavar="N", help="compress with so many (default 128)")
    parser.add_argument("--target", metavar="iOS18", help="minimum_deployment_target, where the format has one")
    parser.add_argument(
        "--cache",
        type=int,
        metavar="N",
        help="causal LM: generate with a key-value cache of N tokens, where the format keeps one",
    )
    add_head_option(parser, "computed after the model in the exported graph")
    add_model_options(parser)


def run(options: argparse.Namespace) -> int:
    target = check_model_options(options)
    from mptrain.core.console import quiet_libraries

    quiet_libraries()
    from mptrain.commands.compressions import Asked
    from mptrain.commands.export import export_model
    from mptrain.core.errors import GateFailed, UserError
    from mptrain.report.render.export_card import compared

    if options.calibration < 1:
        raise UserError(f"--calibration must be at least 1, got {options.calibration}")

    chosen = {
        "minimum_deployment_target": options.target,
        "cache": options.cache,
        "heads": [head_item(text) for text in options.head] or None,
    }
    facts = export_model(
        options.model,
        Path(options.to),
        format=options.format,
        precision=options.precision,
        options={k: v for k, v in chosen.items() if v is not None},
        task=options.task,
        attn=options.attn,
        data=options.data,
        samples=options.samples,
        calibration=options.calibration,
        asked=Asked(options.method, options.group_size, tuple(options.set)),
        length=options.max_length,
        allow_code=options.allow_code,
    )
    if target is not None:
        from mptrain.core.disk import write_json

        write_json(target, facts)
    how = f" ({facts['compressed']['how']})" if facts["compressed"] else ""
    print(
        f"{facts['path']}: {facts['size_bytes'] / 1e6:.1f} MB, {facts['precision']}{how}; the weights in float32 take"
        f" {facts['fp32_bytes'] / 1e6:.1f} MB."
    )
    print(*compared(facts), sep="\n")
    if half := facts["runtime"].get("half"):
        from mptrain.report.words import kept_in_fp32

        print(f"fp16: {kept_in_fp32(half)}.")
    if cache := facts["runtime"].get("cache"):
        kept = facts["runtime"]["cache_precision"]
        print(f"A key-value cache of {cache:,} tokens in {kept}; judged by {facts['judged_by']}.")
    if not facts["passed"]:
        raise GateFailed(
            f"the exported model differs from the torch model by more than {facts['limit']:g} of its largest output; it"
            " was kept."
            if facts["judged_by"] == "parity"
            else f"the exported model decides as the torch model in less than {100 * facts['limit']:.0f}%; it was kept."
        )
    return 0
