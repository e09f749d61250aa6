"""results.json as a report to read: report.md and one self-contained report.html.

`python -m evaluate_zero_shot.report DIR` makes both again from DIR/results.json. Nothing else is read but the figures
others published and the definitions of the protocols.
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
from evaluate_zero_shot.protocols import PROTOCOLS, Protocol, statements
from evaluate_zero_shot.report import sections
from evaluate_zero_shot.report.plots import SIZE
from evaluate_zero_shot.report.published import load
from evaluate_zero_shot.tasks import TASKS
from evaluate_zero_shot.trial import limits
from evaluate_zero_shot.trial.results import Result
from megaft.base.errors import ConfigError, DataError
from megaft.base.files import parse_json, replacing
from megaft.base.nested import leaves
from megaft.base.redaction import without_folders

TEMPLATES = Path(__file__).with_name("templates")
REQUIRED = ("model_name", "task", "protocol")
"""Required fields of a result; the report shows a dash for any other that is missing."""
METRICS = ("word_perplexity", "perplexity", "bits_per_byte", "accuracy")
_MARKDOWN = re.compile(r"[\\`*|\[\]<>&~$]|(?<!\w)_|_(?!\w)")


def write(folder: Path) -> None:
    """Write folder/report.md and folder/report.html from folder/results.json.

    Raises:
        DataError: results.json is missing, damaged, or written by another version.
        ConfigError: The disk refuses.
    """
    for name, text in _rendered(folder / "results.json").items():
        with replacing(folder / name) as file:
            file.write(text)


def _rendered(path: Path) -> dict[str, str]:
    try:
        content = _view(parse_json(path.read_text(encoding="utf-8")))
        return {
            name: _jinja(is_html=name.endswith("html")).get_template(f"{name}.jinja").render(content)
            for name in ("report.md", "report.html")
        }
    except (OSError, ArithmeticError, AttributeError, LookupError, TypeError, UndefinedError, ValueError) as error:
        raise DataError(f"{path} is not a results.json of this version: {error!r}. Evaluate again.") from error


def _view(content: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that the templates print."""
    results = _named([_complete(entry) for entry in content["results"]])
    protocols = {one["protocol"]: _protocol(one["protocol"], content.get("protocols") or {}) for one in results}
    return {
        "results": results,
        "models": sections.provenance(
            results, "name", "num_parameters", "backend", "dtype", "tokenizer_sha256", "model_sha256"
        ),
        "data": sections.provenance(results, "task", "detokenizer", "data_file", "data_sha256"),
        "summary": sections.summary(results),
        "tasks": sections.tasks(results, protocols, load()),
        "illustrations": sections.grouped(sections.illustrations(results), lambda one: (one.heading, one.note)),
        "protocols": [(protocol, statements(protocol)) for protocol in protocols.values()],
        "environment": _environment(results),
        "commands": list(dict.fromkeys(_command(one["command"]) for one in results if one["command"])),
    }


def _complete(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return a result with every field; KeyError if a required one is missing or its task is unknown."""
    optional = dict.fromkeys(Result.__slots__) | {"task_title": TASKS[entry["task"]].title}
    complete = optional | {key: entry[key] for key in REQUIRED} | dict(entry)
    return complete if limits.has_finite_nats(complete) else limits.without_figures(complete)


def _named(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results with their model's name: its path where two share one, its hash too where weights changed."""
    paths = sections.grouped(results, lambda one: one["model_name"])
    shared = {name for name, found in paths.items() if len({one["model"] for one in found}) > 1}
    weights = sections.grouped(results, lambda one: one["model"])
    changed = {path for path, found in weights.items() if len({one["model_sha256"] for one in found}) > 1}
    short = _without_common_folder([str(one["model"]) for one in results if one["model_name"] in shared])
    names = [short.get(str(one["model"])) or str(one["model_name"]) for one in results]
    return [
        one | {"name": f"{name} ({str(one['model_sha256'])[:8]})" if one["model"] in changed else name}
        for one, name in zip(results, names, strict=True)
    ]


def _without_common_folder(paths: Sequence[str]) -> dict[str, str]:
    """Return each path by what to call it: an absolute one from below the folder that all of them share."""
    absolute = [path for path in paths if os.path.isabs(path)]
    common = os.path.commonpath([Path(path).parent.parent for path in absolute]) if absolute else ""
    return {path: os.path.relpath(path, common) if path in absolute else path for path in paths}


def _protocol(name: str, recorded: Mapping[str, Any]) -> Protocol:
    """Return the definition by which it was measured, which is not always today's."""
    return Protocol(**recorded[name]) if name in recorded else PROTOCOLS[name]


def _command(words: Sequence[str]) -> str:
    """Return the words for a shell, the module by its name instead of its path, and no folder of this machine.

    results.json has the command as it was given.
    """
    is_module = words[0].endswith("evaluate_zero_shot/__main__.py")
    named = ["python", "-m", "evaluate_zero_shot", *words[1:]] if is_module else words
    return shlex.join(map(without_folders, named))


def _environment(results: Sequence[Mapping[str, Any]]) -> list[tuple[str, str]]:
    """Return names and values; where results were made with different ones, all of them."""
    found = [leaf for one in results for leaf in leaves(one["environment"] or {}, " ")]
    pairs = dict.fromkeys((name, formats.MISSING if value is None else str(value)) for name, value in found)
    values = sections.grouped(pairs, lambda pair: pair[0])
    return [(name, "; ".join(value for _, value in found)) for name, found in values.items()]


def _jinja(*, is_html: bool) -> Environment:
    """Return an environment in which everything printed is escaped for its format."""
    made = Environment(
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
    made.globals |= {
        "css": Markup(css),
        "css_digest": digest,
        "titles": formats.TITLES,
        "metrics": METRICS,
        "plot_size": SIZE,
    }
    made.globals |= {"run_name": sections.run_name, "window": sections.window, "ranks": sections.ranks}
    made.filters |= {"written": formats.written, "counted": formats.counted, "code_block": _code_block}
    return made


def _for_markdown(value: object) -> str:
    """Return text that Markdown shows as it is, in one line of a table."""
    if isinstance(value, Markup):
        return value
    return _MARKDOWN.sub(r"\\\g<0>", " ".join(str(value).split()))


def _code_block(text: str) -> Markup:
    return Markup("".join(f"    {line}\n" for line in text.splitlines()))


def main(arguments: list[str] | None = None) -> int:
    """Make the reports of the folder named."""
    match sys.argv[1:] if arguments is None else arguments:
        case [folder] if not folder.startswith("-"):
            write(Path(folder))
            return 0
        case ["-h" | "--help"]:
            print(__doc__)
            return 0
    raise ConfigError("usage: python -m evaluate_zero_shot.report DIR, where DIR/results.json is")
