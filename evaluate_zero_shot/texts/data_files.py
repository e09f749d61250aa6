"""Find a task's data file, identify it by SHA-256, and read it without changing a byte."""

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
from megaft.data.text_file import TextFile

FULL_BYTES, TEST_BYTES = 100_000_000, 5_000_000
"""Size of enwik8 and text8, and of their conventional test part."""


@dataclass(frozen=True, slots=True)
class DataFile:
    """File to score.

    Attributes:
        path: Path of the file.
        sha256: Hash of its content; of a .gz or .zst, after decompression.
        name: Name of the published file with this hash, such as "WikiText-103 test"; None for any other file.
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
    """Return the data file of a task: from `data`, else from $MEGAFT_DATA, the cache, or the hub.

    With several ranks, call it on one rank first: files from the hub are written to the cache, ~/.cache/megaft/data.

    Args:
        task: The task.
        text: Word-tokenized or raw text. A file named by `data` is used whichever it is.
        data: The file, or a folder that holds it under one of the task's file names, also as .gz or .zst.
        environment: Environment variables: MEGAFT_DATA, HF_HUB_OFFLINE, HF_DATASETS_OFFLINE, XDG_CACHE_HOME.
        load_rows: Function that downloads rows from the hub.

    Raises:
        DataError: The file does not exist, cannot be read, or belongs to another task.
    """
    files = task.files_for(text)
    if data is not None and not data.exists():
        wanted = f"{files.name} or a folder that holds it" if files else "a UTF-8 text file"
        raise DataError(f"--data {data} does not exist; pass {wanted}.")
    if data is not None and not data.is_dir():
        return _checked(data, task)
    if files is None:
        raise DataError(f"--task {task.name} scores your own file; pass it with --data FILE.")
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
        raise DataError(
            f"MEGAFT_DATA is {folder}, which is not a folder; set it to a folder of data files, or unset it."
        )
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
        variable = hub_files.offline_variable(environment)
        try:
            if variable is None:
                return list(load_rows(*files.hub))
            reason = f"; {variable} forbids downloading {files.hub[0]}"
        except OSError as error:
            reason = f"; {files.hub[0]} could not be downloaded ({error})"
    raise DataError(
        f"--task {task.name} has no {files.name} in {' or '.join(map(str, folders))}{reason}. Accepted paths: "
        f"{', '.join(files.paths)}, also as .gz and .zst. Get it from {files.origin}; pass the file or its folder with "
        "--data, or set $MEGAFT_DATA to the folder."
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
    r"""Return the text of a file, unchanged (\r\n stays) but for a byte order mark at its beginning, which is dropped.

    Args:
        file: The file; .gz and .zst are decompressed.
        task: The task. Of the whole enwik8 or text8 only the conventional test part is read.
        limit_lines: For quick tests: read only the first lines (rows of LAMBADA, questions of CBT).

    Raises:
        DataError: The file cannot be read, or is empty, damaged, blank, UTF-16, binary or not UTF-8; with the offset.
    """
    data, source = _content(file.path), TextFile(file.path)
    begin = source.bom_length(data)
    if task.has_test_part and len(data) == FULL_BYTES:
        begin = _test_begin(data)
    text, _ = source.decode(data[begin:], begin, 1 + data.count(b"\n", 0, begin), final=True)
    if limit_lines is not None:
        text = first_questions(text, limit_lines) if task.kind == "cloze" else "".join(lines(text)[:limit_lines])
    if not text.strip():
        part = "" if limit_lines is None else f" in its first {limit_lines} lines"
        raise DataError(f"{file.path} holds only blank lines{part}; give a file with text, or read more of it.")
    return text


def read_records(file: DataFile, task: Task, limit_lines: int | None) -> list[str] | None:
    """Return the texts of a file of JSON records, one document each; None for a plain text file (see `read_text`).

    Published files are never read as records: LAMBADA's rows have rules of their own.

    Args:
        file: The file.
        task: The task.
        limit_lines: For quick tests: read only the first records.

    Raises:
        DataError: The file is neither text nor JSON records, or the task needs plain text.
    """
    if file.name is not None:
        return None
    source = TextFile(file.path)
    if source.format == "text" or task.kind == "last-word":
        return None
    if task.files is not None:
        raise DataError(
            f"{file.path} holds JSON records, but --task {task.name} scores {task.files.name}, a text; use --task text."
        )
    texts = (record.text(DEFAULT_KEY) for record in islice(records_of(source), limit_lines))
    documents = [text for text in texts if text.strip()]
    if not documents:
        raise DataError(f"{file.path} holds only blank texts; give a file with text.")
    return documents


def _test_begin(data: bytes) -> int:
    begin = len(data) - TEST_BYTES
    while data[begin] & 0xC0 == 0x80:  # inside a character
        begin += 1
    return begin


def _content(path: Path) -> bytes:
    data = b"".join(TextFile(path).content())
    if not data:
        raise DataError(f"{path} is empty; give a file with text.")
    return data
