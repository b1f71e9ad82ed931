"""README.md beside a model that `mptrain export` wrote: what it is, what was compared, how to load it."""

from __future__ import annotations

import yaml

from mptrain.recipe.exports import spec_of
from mptrain.report.render.card import fence, loading, short
from mptrain.report.render.markdown import escape
from mptrain.report.row import Row


def export_card(facts: Row) -> str:
    """facts: of `mptrain export` (schema mptrain.export/v1)."""
    spec, about = spec_of(facts["format"]), facts["about_task"]
    tags = ["mptrain", *filter(None, [spec.library]), facts["precision"]]
    named = {"library_name": spec.library, "pipeline_tag": about["tag"]}
    front = {**{key: value for key, value in named.items() if value}, "tags": tags}
    done = facts["compressed"]
    how = f", {done['how']}" if done else ""
    source = escape(short(facts["model"]))
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# {source} for {spec.title}",
        f"{source} ({facts['task'].replace('-', ' ')}) as {spec.title}, {facts['precision']}{how}:"
        f" {facts['size_bytes'] / 1e6:.1f} MB, where the weights in float32 take {facts['fp32_bytes'] / 1e6:.1f} MB.",
        "## What was compared",
        "\n".join(f"- {line}" for line in compared(facts)),
    ]
    path = facts["path"].rpartition("/")[2]
    cut = facts["max_length"] if about.get("cuts") else None
    if code := loading(facts["format"], about, f"./{path}", ".", cut, facts["runtime"]):
        parts += ["## Use", fence(code)]
    parts.append("Accuracy was not measured: a recipe scores the exported model on a test split.")
    return "\n\n".join(parts) + "\n"


def compared(facts: Row) -> list[str]:
    """Sentences on the differences, for the card and for the terminal."""
    lines = [f"Against the torch model that was written: {_difference(facts['parity'], facts['inputs'])}"]
    if done := facts["compressed"]:
        lines.append(f"Against the model before it was compressed: {_difference(done['change'], facts['inputs'])}")
        if done["stored"]:
            lines.append(f"Stored: {done['stored']}.")
        if done["expanded"]:
            lines.append(f"{done['expanded']}.")
    return lines


def _difference(found: Row, inputs: str) -> str:
    return (
        f"largest difference {found['max_abs_diff']:.2g} on {found['examples']} inputs ({inputs}), same decision in"
        f" {100 * found['agreement']:.1f}%."
    )
