"""Find a task's data file, identify it by its hash, and read it exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from evaluate_zero_shot.tasks import Files, Task, Text
from evaluate_zero_shot.texts import hub_files
from evaluate_zero_shot.texts.cbt import first_questions
from evaluate_zero_shot.texts.known_files import KNOWN
from evaluate_zero_shot.texts.pages import lines
from megaft.base.errors import DataError
from megaft.config.prepare import DEFAULT_KEY
from megaft.data.record_file import records_of
from megaft.data.text_file import Source

FULL_BYTES, TEST_BYTES = 100_000_000, 5_000_000
"""Size of enwik8 and text8, and of their conventional test part."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """A file to score.

    Attributes:
        sha256: Of its content, decompressed where it is a .gz or .zst.
        name: What it is, such as "WikiText-103 test"; None where no published hash fits: another file or a damaged one.
    """

    path: Path
    sha256: str
    name: str | None


def find_data(
    task: Task,
    text: Text,
    data: Path | None,
    environment: Mapping[str, str],
    load_rows: hub_files.LoadRows = hub_files.load_rows,
) -> DataFile:
    """Return the file a task scores: from `data`, else from $MEGAFT_DATA, the cache, or the hub.

    With several ranks, call it on one first: what comes from the hub is written to the cache, ~/.cache/megaft/data.

    Args:
        task: The task.
        text: Whether the word-tokenized or the raw text is wanted. A file named by `data` is taken as it is.
        data: The file, or a folder that holds it under one of the names in the task's files, also as .gz or .zst.
        environment: Of the process: MEGAFT_DATA, HF_HUB_OFFLINE, HF_DATASETS_OFFLINE, XDG_CACHE_HOME.
        load_rows: What asks the hub.

    Raises:
        DataError: There is no such file, it cannot be read, or it is known as another task's.
    """
    files = task.wanted(text)
    if data is not None and not data.exists():
        wanted = f"{files.name} or a folder that holds it" if files else "a UTF-8 text file"
        raise DataError(f"--data {data} does not exist; name {wanted}.")
    if data is not None and not data.is_dir():
        return _checked(data, task)
    if files is None:
        raise DataError(f"--task {task.name} scores a file of yours; name it with --data FILE.")
    cache = Path(environment.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megaft" / "data"
    folders = [data] if data is not None else [*_data_folder(environment), cache]
    path = next((path for folder in folders for path in _candidates(folder, files) if path.is_file()), None)
    if path is None:
        path = cache / files.paths[0]
        hub_files.write_file(_hub_rows(task, files, folders, data, environment, load_rows), path, task)
    return _checked(path, task)


def _data_folder(environment: Mapping[str, str]) -> list[Path]:
    folder = environment.get("MEGAFT_DATA")
    if folder and not Path(folder).is_dir():
        raise DataError(f"MEGAFT_DATA is {folder}, which is no folder; name a folder of data files, or unset it.")
    return [Path(folder)] if folder else []


def _candidates(folder: Path, files: Files) -> list[Path]:
    return [folder / f"{path}{suffix}" for path in files.paths for suffix in ("", ".gz", ".zst")]


def _hub_rows(
    task: Task,
    files: Files,
    folders: list[Path],
    data: Path | None,
    environment: Mapping[str, str],
    load_rows: hub_files.LoadRows,
) -> list[str]:
    reason = ""
    if data is None and files.hub is not None:
        variable = hub_files.offline(environment)
        try:
            if variable is None:
                return list(load_rows(*files.hub))
            reason = f"; {variable} keeps it from {files.hub[0]}"
        except OSError as error:
            reason = f"; {files.hub[0]} cannot be had ({error})"
    raise DataError(
        f"There is no {files.name} for --task {task.name} in {' or '.join(map(str, folders))}{reason}. Looked for "
        f"{', '.join(files.paths)}, also as .gz and .zst. Get it from {files.origin}; name the file or its folder with "
        "--data, or the folder with $MEGAFT_DATA."
    )


def _checked(path: Path, task: Task) -> DataFile:
    sha256 = hashlib.sha256(_content(path)).hexdigest()
    known = KNOWN.get(sha256)
    if known is not None and task.files is not None and task.name not in known.tasks:
        raise DataError(
            f"{path} is {known.name} (SHA-256 {sha256[:8]}), which --task {task.name} does not score; use --task "
            f"{known.tasks[0]} for it, or get {task.files.name} from {task.files.origin}."
        )
    return DataFile(path, sha256, known.name if known else None)


def read_text(file: DataFile, task: Task, limit_lines: int | None) -> str:
    r"""Return a file's text as it is, \r\n kept; only a byte order mark at its beginning is left out, and not counted.

    Args:
        file: The file; .gz and .zst are decompressed.
        task: Its task. Of the whole enwik8 or text8 only the test part is read, as their description says.
        limit_lines: For trials, only the first lines: rows of LAMBADA, questions of the Children's Book Test.

    Raises:
        DataError: The file cannot be read, is empty, damaged, blank, UTF-16, binary, or not UTF-8; with the offset.
    """
    data, source = _content(file.path), Source(file.path)
    begin = source.mark_bytes(data)
    if task.name in {"enwik8", "text8"} and len(data) == FULL_BYTES:
        begin = _test_begin(data)
    text, _ = source.decode(data[begin:], begin, 1 + data.count(b"\n", 0, begin), final=True)
    if limit_lines is not None:
        text = first_questions(text, limit_lines) if task.kind == "cloze" else "".join(lines(text)[:limit_lines])
    if not text.strip():
        part = "" if limit_lines is None else f" in its first {limit_lines} lines"
        raise DataError(f"{file.path} holds only blank lines{part}; give a file with text, or read more of it.")
    return text


def read_records(file: DataFile, task: Task, limit_lines: int | None) -> list[str] | None:
    """Return the texts of a file of JSON records, a document each; None for a file of text, which `read_text` reads.

    A published file is what its task says: LAMBADA's rows are read by their own rules.

    Args:
        file: The file.
        task: Its task.
        limit_lines: For trials, only the first records.

    Raises:
        DataError: The file is neither text nor JSON records, or the task needs text.
    """
    if file.name is not None:
        return None
    source = Source(file.path)
    if source.format == "text" or task.kind == "last-word":
        return None
    if task.files is not None:
        raise DataError(
            f"{file.path} holds JSON records, but --task {task.name} scores {task.files.name}, a text; use --task text."
        )
    texts = (record.text(DEFAULT_KEY) for record in islice(records_of(source), limit_lines))
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise DataError(f"{file.path} has no text but blanks in its records; give a file with text.")
    return documents


def _test_begin(data: bytes) -> int:
    begin = len(data) - TEST_BYTES
    while data[begin] & 0xC0 == 0x80:  # inside a character
        begin += 1
    return begin


def _content(path: Path) -> bytes:
    data = b"".join(Source(path).content())
    if not data:
        raise DataError(f"{path} is empty; give a file with text.")
    return data
