"""Multiple-choice task files of lm-eval (EleutherAI's lm-evaluation-harness, version 0.4): read, never run.

A file is YAML 1.1 and may include others, whose keys it overrides. Every key is understood, or without
effect on a zero-shot or few-shot score (`WITHOUT_EFFECT`), or an error that names it: a task that is scored here is
scored as lm-eval does. Python (`!function`) is never imported.

Templates are Jinja2 in its immutable sandbox, over the columns of a row, with lm-eval's filter
`regex_replace(pattern, replacement, count=0)`: no attribute that leads to code, no change of the row. What a
template prints as a list is read as literals (`ast.literal_eval`).
"""

from __future__ import annotations

import ast
import difflib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args

import yaml
from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mptrain.core.errors import DataError

Document = dict[str, Any]
Metric = Literal["acc", "acc_norm"]
Sampler = Literal["default", "first_n"]

WITHOUT_EFFECT = ("metadata", "tag", "task_alias", "should_decontaminate", "doc_to_decontamination_query")
_REFUSED = {
    "process_docs": "it is Python code that changes the rows",
    "process_results": "it is Python code that scores",
    "custom_dataset": "it is Python code that makes the rows",
    "class": "it names Python code",
    "unsafe_code": "it allows code to run",
    "group": "this is a group of tasks; name the files of its tasks",
    "task_list": "this is a list of tasks; name the files of the tasks",
    "filter_list": "filters change the answers of a model; multiple choice has none",
    "generation_kwargs": "nothing is generated",
    "use_prompt": "promptsource is not supported; write the prompt in doc_to_text",
    "gen_prefix": "a prefix of the answer is not supported; write it at the end of doc_to_text",
    "doc_to_image": "only text is supported",
    "doc_to_audio": "only text is supported",
    "repeats": "a log-likelihood is the same every time",
}
_HARMLESS = {"unsafe_code": (False,), "repeats": (1,)}


@dataclass(frozen=True)
class _Tagged:
    text: str


@dataclass(frozen=True)
class TaskFile:
    """The keys of a task file; `path` is named in messages, `folder` is what relative data files may start from."""

    path: str
    folder: Path
    task: str
    dataset_path: str
    doc_to_text: str
    doc_to_choice: str | list | dict
    doc_to_target: str | int | list
    dataset_name: str | None = None
    dataset_kwargs: Mapping[str, Any] = field(default_factory=dict)
    training_split: str | None = None
    validation_split: str | None = None
    test_split: str | None = None
    fewshot_split: str | None = None
    num_fewshot: int = 0
    sampler: Sampler = "default"
    description: str = ""
    target_delimiter: str = " "
    fewshot_delimiter: str = "\n\n"
    metrics: tuple[Metric, ...] = ("acc", "acc_norm")

    @property
    def scored_split(self) -> str:
        return self.test_split or self.validation_split or ""

    @property
    def shots_split(self) -> str:
        """Where few-shot examples come from."""
        return self.fewshot_split or self.training_split or self.scored_split

    def refuse(self, key: str, why: str) -> NoReturn:
        raise DataError(f"{self.path}: {key}: {why}.")

    def text(self, row: Document) -> str:
        """The question, as the model reads it."""
        value = self._column_or_template("doc_to_text", self.doc_to_text, row)
        if not isinstance(value, str) or (value.isdigit() and self.doc_to_text not in row):
            self.refuse("doc_to_text", f"gives {value!r}; numbers, which stand for one context per choice, are refused")
        return value

    def choices(self, row: Document) -> list[str]:
        how = self.doc_to_choice
        value: Any = list(how.values()) if isinstance(how, dict) else how
        if isinstance(how, str):
            value = self._column_or_template("doc_to_choice", how, row)
            if how not in row:
                value = self._literal("doc_to_choice", value)
        if not isinstance(value, list) or not value or not all(isinstance(c, str) and c for c in value):
            self.refuse("doc_to_choice", f"gives {value!r} where a list of texts, none of them empty, is needed")
        return value

    def gold(self, row: Document, choices: list[str]) -> list[int]:
        """Indices of the right choices, mostly one."""
        value: Any = self.doc_to_target
        if isinstance(value, str):
            value = self._column_or_template("doc_to_target", value, row)
            if self.doc_to_target not in row and value.isdigit():
                value = int(value)
            elif self.doc_to_target not in row and value.startswith("[") and value.endswith("]"):
                value = self._literal("doc_to_target", value)
        if isinstance(value, str) and value in choices:
            value = choices.index(value)
        found = value if isinstance(value, list) else [value]
        if not found or not all(isinstance(i, int) and 0 <= i < len(choices) for i in found):
            self.refuse("doc_to_target", f"gives {value!r}, which is no index and none of the choices {choices}")
        return [int(i) for i in found]

    def preface(self, row: Document) -> str:
        """The description, which stands before everything else."""
        value = self._column_or_template("description", self.description, row) if self.description else ""
        return value if isinstance(value, str) else self.refuse("description", f"gives {value!r}, which is no text")

    def _column_or_template(self, key: str, how: str, row: Document) -> Any:
        if how in row:
            return row[how]
        try:
            return _JINJA.from_string(how).render(row)
        except TemplateError as error:  # also an undefined name, and what the sandbox forbids
            self.refuse(key, f"the template {how!r} failed: {error}; the columns are {', '.join(row)}")
        except Exception as error:  # whatever an expression over the row raises: ValueError, TypeError, IndexError…
            self.refuse(key, f"the template {how!r} failed: {type(error).__name__}: {error}")

    def _literal(self, key: str, text: str) -> Any:
        try:
            return ast.literal_eval(text)
        except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
            self.refuse(key, f"gives {text[:200]!r}, which is not a list as Python writes it")


def read_task(file: str) -> TaskFile:
    """Read and check a task file. Raises DataError that names file and key."""
    path = Path(file).expanduser()
    keys = _load(path, file, ())
    known = [*TaskFile.__dataclass_fields__, "output_type", "metric_list", "fewshot_config", *WITHOUT_EFFECT, *_REFUSED]
    known = [name for name in known if name not in ("path", "folder", "sampler", "metrics")]

    def refuse(key: str, why: str) -> NoReturn:
        raise DataError(f"{file}: {key}: {why}.")

    for key in ("group", "task_list", "class"):
        if keys.get(key) is not None:
            refuse(key, _REFUSED[key])
    if keys.get("output_type") != "multiple_choice":
        kind = keys.get("output_type") or "generate_until"
        refuse("output_type", f"{kind!r} is not supported; only multiple_choice is")
    for key, value in keys.items():
        if key not in known:
            close = difflib.get_close_matches(str(key), known, n=1, cutoff=0.7)
            refuse(str(key), "no key that is known here" + (f"; did you mean {close[0]}" if close else ""))
        if key in WITHOUT_EFFECT or value is None or value in _HARMLESS.get(key, ()):
            continue
        if code := _tagged(value):
            fix = "write it as a Jinja template, or prepare the data so that a column holds it"
            refuse(key, f"{code.text} is Python code, which is never run; {fix}")
        if key in _REFUSED:
            refuse(key, f"{value!r} is not supported: {_REFUSED[key]}")
    given = {key: value for key, value in keys.items() if value is not None and key not in WITHOUT_EFFECT}
    for key in ("task", "dataset_path", "doc_to_text", "doc_to_choice", "doc_to_target"):
        if key not in given:
            refuse(key, "is missing")
    for key, kinds in _KINDS.items():
        if key in given and (not isinstance(given[key], kinds) or (isinstance(given[key], bool))):
            refuse(key, f"got {given[key]!r}, must be {' or '.join(_WORDS[k] for k in kinds)}")
    if given.get("num_fewshot", 0) < 0:
        refuse("num_fewshot", f"got {given['num_fewshot']}, must not be negative")
    if not (given.get("test_split") or given.get("validation_split")):
        refuse("test_split", "is missing, and validation_split too; give the split to score")
    fields = {k: v for k, v in given.items() if k in TaskFile.__dataclass_fields__}
    return TaskFile(
        path=file,
        folder=path.absolute().parent,
        **fields,
        sampler=_sampler(given.get("fewshot_config", {}), refuse),
        metrics=_metrics(given.get("metric_list"), refuse),
    )


_KINDS: dict[str, tuple[type, ...]] = {
    **dict.fromkeys(("task", "dataset_path", "dataset_name", "doc_to_text", "description"), (str,)),
    **dict.fromkeys(("training_split", "validation_split", "test_split", "fewshot_split"), (str,)),
    **dict.fromkeys(("target_delimiter", "fewshot_delimiter"), (str,)),
    **dict.fromkeys(("dataset_kwargs", "fewshot_config"), (dict,)),
    "num_fewshot": (int,),
    "metric_list": (list,),
    "doc_to_choice": (str, list, dict),
    "doc_to_target": (str, int, list),
}
_WORDS = {str: "a text", int: "a whole number", list: "a list", dict: "a mapping"}


def _sampler(config: dict, refuse: Any) -> Sampler:
    for key in config:
        if key != "sampler":
            refuse(f"fewshot_config.{key}", "is not supported; only sampler is, and fewshot_split beside it")
    name = config.get("sampler", "default")
    if name not in get_args(Sampler):
        refuse("fewshot_config.sampler", f"{name!r} is not supported; {' and '.join(get_args(Sampler))} are")
    return name


def _metrics(entries: list | None, refuse: Any) -> tuple[Metric, ...]:
    """acc and acc_norm are lm-eval's own default."""
    expected = {"aggregation": "mean", "higher_is_better": True}
    names = []
    for entry in [{"metric": name} for name in get_args(Metric)] if entries is None else entries:
        if not isinstance(entry, dict) or entry.get("metric") not in get_args(Metric):
            name = entry.get("metric") if isinstance(entry, dict) else entry
            refuse("metric_list", f"the metric {name!r} is not supported; {' and '.join(get_args(Metric))} are")
        for key, value in entry.items():
            if key not in ("metric", "weight_by_size") and expected.get(key) != value:  # a size counts in groups
                refuse(f"metric_list.{key}", f"{value!r} of {entry['metric']} is not supported")
        names.append(entry["metric"])
    if not names or len(set(names)) != len(names):
        refuse("metric_list", f"names {names}; each metric once, at least one")
    return tuple(names)


def _load(path: Path, name: str, above: tuple[Path, ...]) -> dict[str, Any]:
    """The keys of a file over those of the files it includes, which are relative to it."""
    path = path.resolve()
    if path in above:
        raise DataError(f"{name}: include: {path.name} includes itself.")
    try:
        keys = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except FileNotFoundError:
        raise DataError(
            f"evaluate.multiple_choice: there is no file {path}. Give the path of a task file of lm-eval."
        ) from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise DataError(f"{name}: cannot be read as YAML: {error}") from None
    if not isinstance(keys, dict):
        raise DataError(f"{name}: a task file is a mapping of keys, got {type(keys).__name__}.")
    includes = keys.pop("include", None) or []
    merged: dict[str, Any] = {}
    for each in includes if isinstance(includes, list) else [includes]:
        if not isinstance(each, str):
            raise DataError(f"{name}: include: got {each!r}, must be the path of a file.")
        merged |= _load(path.parent / Path(each).expanduser(), f"{name}, include {each}", (*above, path))
    return merged | keys


def _tagged(value: Any) -> _Tagged | None:
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, list):
        return next((found for item in value if (found := _tagged(item))), None)
    return value if isinstance(value, _Tagged) else None


class _Loader(yaml.SafeLoader):
    """YAML as lm-eval reads it, but a key given twice is an error and tags such as !function are only noted."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict:
        names = [self.construct_object(key, deep=True) for key, _ in node.value if key.tag != _MERGE]
        twice = next((n for n in names if isinstance(n, str) and names.count(n) > 1), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(None, None, f"the key {twice!r} is given twice", node.start_mark)
        return super().construct_mapping(node, deep)


_MERGE = "tag:yaml.org,2002:merge"
_Loader.add_multi_constructor("!", lambda loader, tag, node: _Tagged(f"!{tag} {getattr(node, 'value', '')}"))


def _regex_replace(text: str, pattern: str, replacement: str, count: int = 0) -> str:
    return re.sub(pattern, replacement, text, count=count)


_JINJA = ImmutableSandboxedEnvironment(undefined=StrictUndefined, keep_trailing_newline=True)
_JINJA.filters["regex_replace"] = _regex_replace
