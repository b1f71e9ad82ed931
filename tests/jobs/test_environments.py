"""Where and how it may be run: paths, disks, homes, networks and memory that are not as usual end in one paragraph."""

from __future__ import annotations

import json
import pickle

import pytest
from kit import tiny
from kit.jobs import run
from kit.long import except_for
from kit.processes import python

LIMITED = """
import resource, sys
from mptrain.cli import main
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + {more} * 2**20,) * 2)
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    tiny.save_bert(folder)
    return folder


def said(done, status, *fragments):
    """One paragraph, and no traceback."""
    assert done.status == status, done.stdout[-500:] + done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("mptrain: ") and "see docs" not in line]
    assert len(lines) == 1 and all(fragment in lines[0] for fragment in fragments), done.stderr[-2000:]


def export(model, to, tmp_path, **environment):
    return python("-m", "mptrain", "export", str(model), "--to", str(to), cwd=tmp_path, output=tmp_path, **environment)


@pytest.mark.parametrize("to", except_for(["/proc/mptrain/out", "/sys/out"], ["/sys/out"]))
def test_a_folder_that_cannot_be_written(bert, tmp_path, to):
    said(export(bert, to, tmp_path), 2, to)
    recipe = tiny.write(tiny.jpqd(tmp_path, output={"dir": to}), tmp_path / "recipe.yaml")
    said(python("-m", "mptrain", "recipe", str(recipe), cwd=tmp_path, output=tmp_path), 2, to)


def test_a_path_through_a_file(bert, tmp_path):
    (tmp_path / "file").write_text("text")
    said(export(bert, tmp_path / "file" / "out", tmp_path), 2, "File exists")


def test_a_path_in_any_script(tmp_path):
    folder = tmp_path / "läufe 日本 'x' $HOME"
    described = tiny.jpqd(folder)
    described["stages"] = [{"id": "dense", "train": {"epochs": 1, "lr": 1e-3, "batch_size": 8}}]
    described["export"] = [{"id": "ov", "format": "openvino", "of": ["dense"], "precision": ["fp32"]}]
    described["gates"] = {"fused_attention": None}
    run(tiny.write(described, folder / "régime.yaml"))
    assert json.loads((folder / "run" / "report.json").read_text())["variants"]


def test_without_a_home(bert, tmp_path):
    done = export(bert, tmp_path / "ov", tmp_path, HOME="", MPTRAIN_CACHE="", XDG_CACHE_HOME="")
    assert done.status == 0, done.stderr[-3000:]


def test_too_little_memory(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(hidden_size=768, intermediate_size=2048, num_hidden_layers=8, vocab_size=32000)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "large")
    words = ("-c", LIMITED.format(more=150), "export", str(tmp_path / "large"), "--to", str(tmp_path / "ov"))
    said(python(*words, cwd=tmp_path, output=tmp_path), 1, "out of memory")
    assert not list(tmp_path.glob("*ov*")), "nothing half-written"


def _huge(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 10**12, "hidden_size": 10**9}))


def _code(folder):
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModelForSequenceClassification": "evil.Evil", "AutoConfig": "evil.Config"}
    config["model_type"] = "evil"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "evil.py").write_text(f"open({str(folder.parent / 'ran')!r}, 'w')\n")


class _Opens:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def _pickle(folder):
    (folder / "model.safetensors").unlink()
    for name in ("pytorch_model.bin", "training_args.bin"):
        (folder / name).write_bytes(pickle.dumps(_Opens(str(folder.parent / "ran"))))


def _link(folder):
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to("/etc/passwd")


def _outside(folder):
    """A shard of an index that lies outside the folder."""
    whole = folder / "model.safetensors"
    whole.rename(folder.parent / "outside.safetensors")
    index = {"metadata": {}, "weight_map": {"classifier.weight": "../outside.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("harm", [_huge, _code, _pickle, _link, _outside])
def test_a_hostile_folder_runs_nothing(bert, tmp_path, harm):
    folder = tmp_path / "hostile"
    folder.mkdir()
    for file in bert.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    harm(folder)
    before = sorted(tmp_path.rglob("*"))
    words = ("-c", LIMITED.format(more=2000), "export", str(folder), "--to", str(tmp_path / "ov"))
    output = tmp_path / "output"
    output.mkdir()
    said(python(*words, cwd=tmp_path, output=output), 2, "hostile")
    assert not (tmp_path / "ran").exists()
    assert sorted(p for p in tmp_path.rglob("*") if output not in (p, p.parent)) == before
