"""Pages, cards and terminal: from report.json alone, safe with any string, honest in words."""

from __future__ import annotations

import copy
import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard
from hypothesis import given, settings
from hypothesis import strategies as st
from kit import report_sample as sample
from markdown_it import MarkdownIt
from rich.console import Console

from mptrain.core.disk import write_json
from mptrain.core.errors import UserError
from mptrain.data.tasks.metrics import EXP_RATIO, F1, MEAN, RATIO, Score
from mptrain.report import words
from mptrain.report.render import files
from mptrain.report.render.card import card
from mptrain.report.render.markdown import escape, markdown
from mptrain.report.render.page import page
from mptrain.report.render.plots import plots
from mptrain.report.render.terminal import summary
from mptrain.report.tables import results as tables

HOSTILE = (
    "<script>alert(1)</script> \"x\" 'y' | `a` **b** [c](http://evil) ![d](e) $x_{$ \\ & {{7*7}} \x1b[31m\n# h\n---"
)


@pytest.fixture(scope="module")
def report():
    return sample.report()


@pytest.fixture(scope="module")
def html(report):
    return page(report)


@pytest.fixture(scope="module")
def hostile():
    """Every string that a model, a data set or a recipe can choose, hostile."""
    report = json.loads(json.dumps(sample.report()))

    def poison(value: Any) -> Any:
        if isinstance(value, str):
            return f"{value} {HOSTILE}"
        if isinstance(value, list):
            return [poison(item) for item in value]
        if isinstance(value, dict):
            return {key: poison(item) for key, item in value.items()}
        return value

    for key in ("host", "versions", "data", "notes"):
        report[key] = poison({**report[key], HOSTILE: HOSTILE} if isinstance(report[key], dict) else [HOSTILE])
    report["name"] = poison(report["name"])
    for stage in [*report["recipe"]["stages"], *report["training"]]:
        key = "id" if "id" in stage else "stage"
        stage[key] = poison(stage[key])
    report["recipe"]["description"] = HOSTILE
    report["recipe"]["model"]["path"] = HOSTILE
    report["recipe"]["data"]["source"] = HOSTILE
    for row in report["history"]:
        row.update(stage=poison(row["stage"]), phase=poison(row["phase"]))
    for layer in report["structure"]["layers"]:
        layer["layer"] = poison(layer["layer"])
    report["structure"]["family"] = HOSTILE
    for variant in report["variants"]:
        for key in ("id", "path"):
            variant[key] = poison(variant[key])
        variant["runtime"] = poison(variant["runtime"])
        variant["runtime"]["weight_types"] = {HOSTILE: 1_000_000}
    for row in report["comparisons"]:
        row.update(id=poison(row["id"]), vs=poison(row["vs"]))
    report["baseline"] = poison(report["baseline"])
    report["gates"][0].update(name=HOSTILE, variant=HOSTILE)
    for key in ("id", "smallest", "reason", "warnings"):
        report["recommendation"][key] = poison(report["recommendation"][key])
    report["recommendation"]["by_setting"] = {
        key: {**row, "id": poison(row["id"])} for key, row in report["recommendation"]["by_setting"].items()
    }
    report["checkpoints"] = {"jpqd": HOSTILE}
    return report


class Page(HTMLParser):
    """Tags, attributes and text of a page; checks that tags are balanced."""

    VOID = ("meta", "br", "path", "use", "rect", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta",):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_page_is_self_contained(html):
    text, found = html, Page(html)
    assert not {tag for tag, _ in found.tags} & {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
    for _, attributes in found.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "srcset", "action")]
        assert (attributes.get("href") or "#").startswith("#")
        assert (attributes.get("xlink:href") or "#").startswith("#")
    assert "@import" not in text and not re.search(r"url\((?!#)", text)
    policy = next(a for tag, a in found.tags if tag == "meta" and a.get("http-equiv") == "Content-Security-Policy")
    assert policy["content"] == "default-src 'none'; style-src 'unsafe-inline'"


def test_page_ids_and_references_are_whole(html):
    found = Page(html)
    ids = [attributes["id"] for _, attributes in found.tags if "id" in attributes]
    assert len(ids) == len(set(ids)) > 50
    references = [a["xlink:href"][1:] for _, a in found.tags if "xlink:href" in a]
    references += re.findall(r"url\(#([^)]+)\)", html)
    assert references and set(references) <= set(ids)


def test_page_shows_every_section_and_figure(report, html):
    found = Page(html)
    headings = ["Results", "Latency", "Gates", "Structure", "Training", "What the runtime executes"]
    titles = [plot.title for plot in plots(report)]
    assert len(titles) == 7
    for text in [*headings, *titles, "TF-IDF + logistic regression", "83.31%", "8.11×", "bert.encoder.layer.{0-5}"]:
        assert text in found.text
    drawings = [a for tag, a in found.tags if tag == "svg"]
    assert len(drawings) == 7 and all(a["role"] == "img" and len(a["aria-label"] or "") > 40 for a in drawings)


def test_hostile_strings_are_text_on_the_page(html, hostile):
    found, plain = Page(page(hostile)), Page(html)
    assert {tag for tag, _ in found.tags} == {tag for tag, _ in plain.tags}
    assert {name for _, a in found.tags for name in a} == {name for _, a in plain.tags for name in a}
    assert found.text.count("<script>alert(1)</script>") > 50
    assert "{{7*7}}" in found.text and "$x_{$" in found.text


def test_hostile_strings_are_text_in_markdown(report, hostile):
    parser = MarkdownIt("gfm-like", {"linkify": False, "html": True})
    kinds = [{token.type for token in _tokens(parser.parse(text))} for text in (markdown(report), markdown(hostile))]
    assert kinds[1] <= kinds[0]
    body = card(hostile).split("\n---\n", 1)[1]
    assert {t.type for t in _tokens(parser.parse(body))} <= {t.type for t in _tokens(parser.parse(_body(report)))}
    for a, b in zip(_shapes(parser, markdown(report)), _shapes(parser, markdown(hostile))):
        assert a[0] == b[0]  # as many columns as before


def _body(report: dict[str, Any]) -> str:
    return card(report).split("\n---\n", 1)[1]


def _tokens(tokens):
    for token in tokens:
        yield token
        yield from _tokens(token.children or [])


def _shapes(parser: MarkdownIt, text: str) -> list[tuple[int, int]]:
    """(columns, rows) of every table."""
    found: list[tuple[int, int]] = []
    for token in parser.parse(text):
        if token.type == "table_open":
            found.append((0, 0))
        if token.type == "th_open":
            found[-1] = (found[-1][0] + 1, 0)
        if token.type == "tr_open":
            found[-1] = (found[-1][0], found[-1][1] + 1)
    return found


@settings(max_examples=400, deadline=None)
@given(st.one_of(st.text(max_size=40), st.text("\\`*_[]()<>|~$#!&;-+=.:/@ \n\tab1", max_size=30)))
def test_escaped_text_renders_as_itself(text):
    shown = "".join(c for c in re.sub(r"\s+", " ", text) if c.isprintable())
    parser = MarkdownIt("gfm-like", {"linkify": False, "html": True})
    inline = parser.parseInline(f"x{escape(text)}x")[0].children or []
    assert {token.type for token in inline} <= {"text", "text_special"}
    assert "".join(token.content for token in inline) == f"x{shown}x"
    table = parser.parse(f"| a | b |\n| - | - |\n| {escape(text)} | y |\n")
    assert [token.type for token in table].count("td_open") == 2
    assert [t.content for t in table if t.type == "inline"][3] == "y"


def test_card_is_what_the_hub_reads(report):
    found = ModelCard(card(report))
    assert found.data.pipeline_tag == "text-classification" and found.data.library_name == "openvino"
    assert "license" not in found.data.to_dict() and "base_model" not in found.data.to_dict()
    results = {r.metric_name: r.metric_value for r in found.data.eval_results}
    assert results["accuracy, jpqd_int8"] == report["variants"][2]["metrics"]["accuracy"]["value"]
    assert "OVModelForSequenceClassification.from_pretrained(folder, ov_config={" in found.text
    assert "folder = 'export/pruned_fp32'" in found.text
    assert "mptrain.load('stages/jpqd/model')" in found.text


def test_card_names_what_is_on_the_hub_and_survives_hostile_names(report, hostile):
    changed = copy.deepcopy(report)
    changed["recipe"]["model"]["path"], changed["recipe"]["data"]["source"] = "org/model", "org/data"
    changed["on_hub"] = {"model": True, "data": True}
    front = yaml.safe_load(card(changed).split("---\n")[1])
    assert (front["base_model"], front["datasets"]) == ("org/model", ["org/data"])
    head = card(hostile).split("\n---\n", 1)[0].removeprefix("---\n")
    assert yaml.safe_load(head)["model-index"][0]["name"] == hostile["name"]


def test_card_code_runs_in_python(hostile, report):
    for each in (report, hostile):
        blocks = re.findall(r"^(`{3,})python\n(.*?)\n\1$", card(each), re.DOTALL | re.MULTILINE)
        assert len(blocks) == 2
        for _, code in blocks:
            compile(code, "card", "exec")


def test_rendering_from_the_file_gives_the_same(report, html, tmp_path):
    write_json(tmp_path / "report.json", report)
    paths = files.render(files.read(tmp_path), tmp_path)
    assert [p.name for p in paths] == ["report.md", "report.html", "README.md"]
    texts = [p.read_text(encoding="utf-8") for p in paths]
    assert texts == [markdown(report), html, card(report)]
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "there is no report"),
        ("{", "not a readable report"),
        ("[]", "schema is None"),
        ('{"schema": "x"}', "'x'"),
    ],
)
def test_unreadable_reports_are_user_errors(content, message, tmp_path):
    if content is not None:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(UserError, match=message):
        files.read(tmp_path)


_DRAW = ("mptrain.report.render.plots", "mptrain.report.render.drawing")


def test_without_matplotlib_the_page_has_its_tables(report, monkeypatch):
    for name in [n for n in sys.modules if n.split(".")[0] == "matplotlib" or n in _DRAW]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = Page(page(report))
    assert not [tag for tag, _ in found.tags if tag == "svg"]
    assert 'pip install "mptrain[plots]"' in found.text and "jpqd_int8_emb4" in found.text


def test_build_and_render_do_not_load_torch():
    code = "import sys, mptrain.report.build, mptrain.report.render.files; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_parts_that_a_run_lacks_are_left_out():
    bare = sample.report(variants=[], floor=None, history=[], methods={}, data_facts={}, wall_s={}, checkpoints={})
    found = Page(page(bare))
    assert "Results" not in found.text and "gates missed" in found.text
    assert "## Results" not in markdown(bare) and "## Use" not in card(bare)
    untimed = sample.report(variants=[replace(v, latency_ms={}, runtime={}) for v in sample.variants()])
    assert "Latency" not in [t.title for t in (tables.latency(untimed), tables.results(untimed)) if t]
    assert untimed["recommendation"] is None and "smaller than baseline_fp32" in markdown(untimed)
    Page(page(untimed))
    alone = sample.report(variants=sample.variants()[:1])
    assert "Difference to the baseline" not in Page(page(alone)).text


def test_layers_left_in_float_are_said_with_what_they_are_worth(report):
    line = next(line for line in markdown(report).splitlines() if "pooler, classifier" in line)
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    assert cells[1:] == [
        "pooler, classifier (of 38 units)",
        "85.00%",
        "81.00%",
        "84.90%",
        "0.10 points (≤ 0.20 points)",
        "9",
    ]
    assert "of the torch models on 1,273 validation examples" in Page(page(report)).text


def test_throughput_stands_beside_latency():
    rates = {"baseline_fp32": 40.0, "pruned_fp32": 100.4, "jpqd_int8": 1234.6}
    found = sample.report(
        variants=[
            replace(v, throughput={"b8_s128_t1": {"median": rates[v.id], "max": 2000.0, "requests": 2, "runs": 5}})
            if v.id in rates
            else v
            for v in sample.variants()
        ]
    )
    table = tables.throughput(found)
    assert [cell.text for cell in table.rows[0]] == ["batch 8, 128 tokens, 1 thread", "40.0", "100", "1,235"]
    assert [cell.sub for cell in table.rows[0]] == ["", "", "2.51×", "30.86×"] and table.rows[0][3].best
    assert "2 requests in flight" in table.note
    for text in (markdown(found), card(found), Page(page(found)).text):
        assert "Throughput" in text and "1,235" in text
    assert tables.throughput(sample.report()) is None


def test_every_task_renders():
    rng = np.random.default_rng(0)
    scores = {
        "question-answering": [
            Score("f1", rng.random((50, 1)), MEAN),
            Score("exact_match", (rng.random((50, 1)) < 0.5).astype(float), MEAN),
        ],
        "token-classification": [Score("f1", rng.poisson(2.0, (50, 3)).astype(float), F1)],
        "causal-lm": [
            Score("perplexity", rng.random((50, 2)) + 1, EXP_RATIO, "number", False),
            Score("loss", rng.random((50, 2)) + 1, RATIO, "number", False),
        ],
        "image-classification": [Score("accuracy", np.ones((50, 1)), MEAN)],
        "audio-classification": [Score("accuracy", np.ones((50, 1)), MEAN)],
    }
    for task, measured in scores.items():
        recipe = sample.recipe(model={"path": "packaged:x", "task": task}, gates={"max_drop": 0.01})
        variants = [replace(v, scores=measured) for v in sample.variants()]
        report = sample.report(recipe=recipe, variants=variants, floor=None, history=[], methods={})
        found = Page(page(report))
        assert words.metric_name(measured[0].name) in found.text and "tied" in found.text
        assert "from optimum.intel import OVModelFor" in card(report)
        assert not markdown(report).count("nan")


def test_summary_fits_a_terminal_and_steers_nothing(report, hostile):
    for each, width in ((report, 80), (report, 120), (hostile, 100)):
        stream = io.StringIO()
        Console(file=stream, width=width, color_system=None).print(summary(each))
        text = stream.getvalue()
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text
    stream = io.StringIO()
    Console(file=stream, width=80, color_system=None).print(summary(report))
    for text in ("jpqd_int8_emb4", "8.11× smaller", "2.21× as fast", "passed", "83.31%"):
        assert text in stream.getvalue()


def test_markdown_tables_are_aligned(report):
    block: list[str] = []
    for line in [*markdown(report).splitlines(), ""]:
        if line.startswith("|"):
            block.append(line)
        else:
            assert len(set(map(len, block))) <= 1
            block = []
