"""Report of results.json: report.md and one self-contained report.html.

`python -m evaluate_zero_shot.report DIR` writes both again from DIR/results.json. Nothing else is read but the
published results and the definitions of the protocols.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
from markupsafe import Markup

from evaluate_zero_shot import formats
from evaluate_zero_shot.evaluation import limits
from evaluate_zero_shot.evaluation.results import PROGRAM, Result
from evaluate_zero_shot.protocols import PROTOCOLS, Protocol
from evaluate_zero_shot.report import sections
from evaluate_zero_shot.report.page import render_page
from evaluate_zero_shot.report.plots import SIZE
from evaluate_zero_shot.report.published import load
from evaluate_zero_shot.tasks import TASKS
from megaft.base.errors import ConfigError, DataError
from megaft.base.files import parse_json, replacing
from megaft.base.nested import leaves
from megaft.base.redaction import without_folders

TEMPLATES = Path(__file__).with_name("templates")
REQUIRED = ("model_name", "task", "protocol")
"""Required fields of a result; any other missing field is shown as a dash."""
SUMMARY_METRICS = ("word_perplexity", "perplexity", "bits_per_byte", "accuracy")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_MARKDOWN = re.compile(r"[\\`*|\[\]<>&~$]|(?<!\w)_|_(?!\w)|^#|^[-+=](?=[-+= ]|$)")
_NUMBERED = re.compile(r"^(\d+)([.)])(?= |$)")


def write(folder: Path) -> None:
    """Write folder/report.md and folder/report.html from folder/results.json.

    Raises:
        DataError: results.json is missing, damaged, or written by another version.
        ConfigError: The files cannot be written.
    """
    for name, text in _rendered(folder / "results.json").items():
        with replacing(folder / name) as file:
            file.write(text)


def _rendered(path: Path) -> dict[str, str]:
    try:
        content = _view(parse_json(path.read_text(encoding="utf-8")))
        template = _jinja(is_html=False).get_template("report.md.jinja")
        with_plots = template.render(content)
        return {
            "report.md": template.render(content | {"illustrations": {}}),
            "report.html": render_page(with_plots, content, _jinja(is_html=True)),
        }
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, UndefinedError, ValueError) as error:
        raise DataError(f"{path} is not a results.json of this version: {error!r}. Evaluate again.") from error


def _view(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the templates print."""
    results = _named([_complete(entry) for entry in content["results"]])
    protocols = {
        result["protocol"]: _protocol(result["protocol"], content.get("protocols") or {}) for result in results
    }
    return {
        "results": results,
        "models": sections.provenance(
            results, "name", "num_parameters", "backend", "dtype", "tokenizer_sha256", "model_sha256"
        ),
        "data": sections.provenance(results, "task", "detokenizer", "data_file", "data_sha256"),
        "summary": sections.summary(results),
        "tasks": sections.tasks(results, protocols, load()),
        "titles_of_tasks": list(dict.fromkeys(map(sections.task_title, results))),
        "own_texts": list(dict.fromkeys(map(sections.task_title, filter(sections.is_user_text, results)))),
        "illustrations": sections.group_by(sections.illustrations(results), lambda item: (item.heading, item.note)),
        "protocols": [(protocol, sections.protocol_statements(protocol, results)) for protocol in protocols.values()],
        "environment": _environment(results),
        "commands": list(dict.fromkeys(_command(result["command"]) for result in results if result["command"])),
    }


def _complete(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with every field; KeyError if a required field is missing or the task is unknown."""
    optional = dict.fromkeys(Result.__slots__) | {"task_title": TASKS[entry["task"]].title}
    complete = optional | {key: entry[key] for key in REQUIRED} | dict(entry)
    return complete if limits.has_finite_nats(complete) else limits.without_metrics(complete)


def _named(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Add `name` to results: the model's name, or its path if names collide, and its hash if weights changed."""
    shared = _with_several(results, "model_name", "model")
    changed = _with_several(results, "model", "model_sha256")
    short = _without_common_folder([str(result["model"]) for result in results if result["model_name"] in shared])
    names = [short.get(str(result["model"])) or str(result["model_name"]) for result in results]
    return [
        result | {"name": f"{name} ({str(result['model_sha256'])[:8]})" if result["model"] in changed else name}
        for result, name in zip(results, names, strict=True)
    ]


def _without_common_folder(paths: Sequence[str]) -> dict[str, str]:
    """Return the name of each path; absolute paths are relative to the folder that all of them share."""
    absolute = [path for path in paths if os.path.isabs(path)]
    common = os.path.commonpath([Path(path).parent.parent for path in absolute]) if absolute else ""
    return {path: os.path.relpath(path, common) if path in absolute else path for path in paths}


def _with_several(results: list[dict[str, Any]], key: str, value: str) -> set[Any]:
    """Return the values of field `key` for which field `value` has several values."""
    groups = sections.group_by(results, lambda result: result[key])
    return {name for name, group in groups.items() if len({result[value] for result in group}) > 1}


def _protocol(name: str, recorded: Mapping[str, Any]) -> Protocol:
    """Return the definition recorded with the results, which may differ from today's."""
    return Protocol(**recorded[name]) if name in recorded else PROTOCOLS[name]


def _command(words: Sequence[str]) -> str:
    """Return a command line for a shell, with the module's name instead of its path, and without local folders.

    Older versions recorded the folders in results.json too.
    """
    is_module = words[0].endswith(PROGRAM)
    named = ["python", "-m", "evaluate_zero_shot", *words[1:]] if is_module else words
    return shlex.join(map(without_folders, named))


def _environment(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return names and values; if values differ between results, all of them."""
    entries = [leaf for result in results for leaf in leaves(result["environment"] or {}, " ")]
    pairs = dict.fromkeys((name, formats.MISSING if value is None else str(value)) for name, value in entries)
    values = sections.group_by(pairs, lambda pair: pair[0])
    return [(name, "; ".join(value for _, value in group)) for name, group in values.items()]


def _jinja(*, is_html: bool) -> Environment:
    """Return an environment that escapes everything printed, for HTML or Markdown."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=is_html,
        finalize=None if is_html else _for_markdown,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    css = (TEMPLATES / "report.css").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(css.encode()).digest()).decode()
    environment.globals |= {
        "css": Markup(css),
        "css_digest": digest,
        "titles": formats.TITLES,
        "metrics": SUMMARY_METRICS,
        "plot_size": SIZE,
    }
    environment.globals |= {"setting_name": sections.setting_name, "window": sections.window, "ranks": sections.ranks}
    environment.filters |= {
        "format_metric": formats.format_metric,
        "format_count": formats.format_count,
        "code_block": _code_block,
        "digest": _digest,
    }
    return environment


def _for_markdown(value: object) -> str:
    """Return text that Markdown shows unchanged, in one line, wherever it stands."""
    if isinstance(value, Markup):
        return value
    return _NUMBERED.sub(r"\1\\\2", _MARKDOWN.sub(r"\\\g<0>", " ".join(str(value).split())))


def _code_block(text: str) -> Markup:
    return Markup("".join(f"    {line}\n" for line in text.splitlines()))


def _digest(value: str | None) -> str:
    """Return a SHA-256 as code; any other text as text."""
    return Markup(f"`{value}`") if value and _SHA256.fullmatch(value) else value or formats.MISSING


def main(arguments: list[str] | None = None) -> int:
    """Write the report of a folder."""
    match sys.argv[1:] if arguments is None else arguments:
        case [folder] if not folder.startswith("-"):
            write(Path(folder))
            return 0
        case ["-h" | "--help"]:
            print(__doc__)
            return 0
    raise ConfigError("usage: python -m evaluate_zero_shot.report DIR, where DIR contains results.json")
