"""A share of the soak in every test run, and the damage that it once found."""

import gzip
import json
import zlib

import pytest
from kit import tiny
from kit.tiny_models import inputs as batch_of
from kit.tiny_models import tiny as model_of

from benchmarks.soak import cases, inputs, recipes
from mptrain.core.errors import DataError, ExportError, ModelError, MptrainError, RecipeError, UserError
from mptrain.data.sources.tables import read_table
from mptrain.export.coreml.convert import export_coreml
from mptrain.export.openvino.runner import CompiledIr
from mptrain.export.openvino.write import export_openvino
from mptrain.flow.run_folder import check_identity
from mptrain.mil.program import read_program
from mptrain.models.processor import load_processor
from mptrain.recipe import Model, file


def test_case_n_is_the_same_everywhere():
    texts = [path.read_text(encoding="utf-8") for path in file.bundled()]
    assert [recipes.case(n, texts) for n in range(20)] == [recipes.case(n, texts) for n in range(20)]
    assert len({recipes.case(n, texts) for n in range(20)}) == 20


def test_broken_recipes_end_in_a_message(tmp_path):
    texts = [path.read_text(encoding="utf-8") for path in file.bundled()]
    for number in range(60):
        (tmp_path / "r.yaml").write_text(recipes.case(number, texts), encoding="utf-8", errors="surrogatepass")
        found = cases.command(["validate", str(tmp_path / "r.yaml")])
        assert found.kind in ("exit 0", "exit 2"), (number, found)


def test_a_failure_without_a_word_and_a_traceback_are_told_apart(monkeypatch):
    def fails(arguments):
        raise KeyError("x")

    monkeypatch.setattr(cases, "main", fails)
    assert cases.command([]).kind == "traceback" and "KeyError" in cases.command([]).said
    monkeypatch.setattr(cases, "main", lambda arguments: 1)
    assert cases.command([]).kind == "silent"


@pytest.mark.parametrize("name", ["table csv.gz", "table parquet", "picture png", "sound wav"])
def test_damaged_files_are_refused_or_read_as_before(name, tmp_path):
    made = [*inputs._tables(tmp_path / "tables"), *inputs._media(tmp_path / "media")]
    (kind,) = [kind for kind in made if kind.name == name]
    assert inputs.undamaged(kind, tmp_path / "scratch").kind == "read"
    found = [inputs.run(kind, number, tmp_path / "scratch") for number in range(12)]
    assert {outcome.kind for outcome in found} <= {"read", "refused"}, found
    assert any(outcome.kind == "refused" for outcome in found)


def test_a_bad_compressed_stream_is_the_data_s_fault(tmp_path):
    """zlib has an error of its own, which is none of OSError and ValueError."""
    content = bytearray(gzip.compress(b"text,label\n" + b"".join(b"film %d,a\n" % i for i in range(400))))
    broken = 0
    for at in range(12, len(content) - 8, 7):
        damaged = bytearray(content)
        damaged[at] ^= 0x5A
        (tmp_path / "a.csv.gz").write_bytes(damaged)
        try:
            gzip.decompress(bytes(damaged))
        except zlib.error:
            broken += 1
        except (OSError, EOFError):  # of the kinds that were known before
            pass
        with pytest.raises(DataError, match=r"data.train: .*a.csv.gz could not be read as csv"):
            read_table(str(tmp_path / "a.csv.gz"), "data.train")
    assert broken > 3


def test_a_tokenizer_file_without_a_part_is_the_model_s_fault(tmp_path):
    tiny.save_bert(tmp_path / "bert")
    path = tmp_path / "bert" / "tokenizer.json"
    facts = json.loads(path.read_text())
    del facts["added_tokens"][0]["content"]
    path.write_text(json.dumps(facts))
    with pytest.raises(ModelError, match=r"model.path: the processor .* could not be loaded"):
        load_processor(Model(path=str(tmp_path / "bert"), task="text-classification"))


def test_a_cut_ir_is_named(tmp_path):
    exported = export_openvino(model_of("bert"), batch_of("bert"), tmp_path / "m", precision="fp32")
    content = exported.xml.read_bytes()
    exported.xml.write_bytes(content[: len(content) // 2])
    with pytest.raises(ExportError, match=r"openvino_model.xml: OpenVINO cannot read or compile it .*export the model"):
        CompiledIr(exported.xml)


@pytest.mark.long
def test_a_package_with_cut_weights_is_named(tmp_path):
    package = export_coreml(
        model_of("gpt2", use_cache=False, n_positions=128), batch_of("gpt2"), tmp_path / "m"
    ).package
    weights = next(package.rglob("weight.bin"))
    content = weights.read_bytes()
    for damaged in (b"", content[: len(content) // 2], content[64:]):
        weights.write_bytes(damaged)
        with pytest.raises(UserError, match=r"model.mlpackage: its program or weights cannot be read"):
            read_program(package)


def test_a_run_file_that_describes_no_run_is_named(tmp_path):
    (tmp_path / "run.json").write_text("[]")
    with pytest.raises(MptrainError, match=r"run.json: is no description of a run"):
        check_identity(tmp_path, {"format": 3})


IMPOSSIBLE = {
    "a" * 300: "bytes long",
    "é" * 200: "bytes long",
    "a/" * 2100: "bytes long",
    "a\0b": "NUL",
    "~nobody-here": "home folder",
}
FIELDS = ["model.path", "data.train", "data.source", "stages.dense.teacher", "output.dir", "evaluate.multiple_choice"]


@pytest.mark.parametrize("field", FIELDS)
def test_what_no_path_can_be_is_the_fields_fault(tmp_path, field):
    """pathlib raises OSError, ValueError or RuntimeError about these, wherever one is first asked for."""
    for path, said in IMPOSSIBLE.items():
        described = tiny.jpqd(tmp_path)
        *names, last = field.split(".")
        holder = described
        for name in names:
            holder = (
                next(s for s in holder if s["id"] == name) if isinstance(holder, list) else holder.setdefault(name, {})
            )
        holder[last] = [path] if last == "multiple_choice" else path
        with pytest.raises(RecipeError, match=rf"(?s){field}.*{said}"):
            file.validate(described, "test")


def test_a_path_on_the_command_line_that_is_too_long_is_named(capsys):
    assert cases.main(["validate", "x" * 5000 + ".yaml"]) == 2
    assert "is longer than a path can be" in capsys.readouterr().err
