"""Prepare the text files that a run names: the main rank tokenizes them while the other ranks wait.

This happens before the process group exists, since its collectives would time out during a long preparation. So the
ranks communicate through the run's folder, which they share: prepared data is named by a hash of everything that
determines its tokens, and the main rank lists what it has prepared. Ranks also see there that the main rank has ended.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from functools import cached_property
from hashlib import blake2b
from pathlib import Path
from typing import Any

from megaft.base.errors import ConfigError, DataError
from megaft.base.files import parse_json, replacing, sha256_of, to_json
from megaft.base.redaction import without_secrets
from megaft.data.dataset import Dataset
from megaft.data.prepare import ensure_prepared, opening_ids_of
from megaft.data.tokenizer import AnyTokenizer
from megaft.run.main_rank import MainRank

LAYOUT = 3
"""Version of prepared data, incremented when the same text gives different tokens or another receipt."""
LIST = "prepared.jsonl"
"""File in RUN/data with a line for each text that the main rank has prepared, written when all are ready."""
POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class _Contents:
    """Everything that determines the tokens of a text: equal contents give equal prepared data."""

    sha256: str
    num_bytes: int
    tokenizer_sha256: str
    opening_ids: list[int]
    detokenizer: str
    layout: int = LAYOUT


@dataclass(frozen=True)
class Text:
    """A text file that a setting names, as this rank sees it."""

    setting: str
    path: Path
    tokenizer_source: str
    tokenizer: AnyTokenizer
    detokenizer: str

    @cached_property
    def contents(self) -> _Contents:
        """The contents, hashed on first access."""
        return _Contents(
            sha256=sha256_of(self.path),
            num_bytes=self.path.stat().st_size,
            tokenizer_sha256=self.tokenizer.sha256,
            opening_ids=list(opening_ids_of(self.tokenizer, is_chat=False)),
            detokenizer=self.detokenizer,
        )

    @property
    def prefix_name(self) -> str:
        """Name of the prepared data. It contains no folder and no date, since these may differ between hosts."""
        key = repr(tuple(asdict(self.contents).values()))
        return f"{self.path.name}-{blake2b(key.encode(), digest_size=4).hexdigest()}"


def prepare_for_others(texts: Sequence[Text], folder: Path, *, has_others: bool) -> list[Dataset]:
    """Prepare the texts on the main rank, unless they are prepared already, and list them for the other ranks."""
    if texts or has_others:
        folder.mkdir(parents=True, exist_ok=True)
    (folder / LIST).unlink(missing_ok=True)  # an earlier run's
    datasets = [
        ensure_prepared(
            text.path, folder / text.prefix_name, text.tokenizer_source, text.tokenizer, detokenizer=text.detokenizer
        )
        for text in texts
    ]
    if has_others:
        with replacing(folder / LIST) as file:
            for text in texts:
                row = {"setting": text.setting, "file": text.path.name, "prefix": text.prefix_name}
                file.write(to_json(row | asdict(text.contents)) + "\n")
    return datasets


def wait_for_main(texts: Sequence[Text], folder: Path, rank: int) -> list[Dataset]:
    """Wait until the main rank has prepared these texts.

    Raises:
        ConfigError: The main rank has another text, tokenizer or detokenizer.
        UserError: The main rank failed (the message is its own) or was lost.
    """
    main = MainRank(folder.parent)
    return [_wait_for(text, index, folder, rank, main) for index, text in enumerate(texts)]


def _wait_for(text: Text, index: int, folder: Path, rank: int, main: MainRank) -> Dataset:
    while True:
        if dataset := _complete(folder / text.prefix_name):
            return dataset
        if main.wrote(folder / LIST) and (rows := _listed(folder / LIST)) is not None:
            same = [row for row in rows if _contents_of(row) == text.contents]
            if not same:
                raise ConfigError(_difference_from_main(text, rows[index] if index < len(rows) else None, rank))
            if dataset := _complete(folder / same[0]["prefix"]):  # prepared from a file with another name
                return dataset
        main.require_alive()
        time.sleep(POLL_SECONDS)


def _complete(prefix: Path) -> Dataset | None:
    """Return the prepared data with this prefix if it is complete; the main rank replaces it if it is damaged."""
    dataset = Dataset(str(prefix))
    try:
        _ = dataset.receipt  # read, checked and kept
    except DataError:
        return None
    return dataset


def _listed(path: Path) -> list[dict[str, Any]] | None:
    """Return the main rank's list; None if it has just been removed."""
    try:
        return [parse_json(line) for line in path.read_text("utf-8").splitlines()]
    except FileNotFoundError:
        return None


def _contents_of(row: dict[str, Any]) -> _Contents | None:
    names = [field.name for field in fields(_Contents)]
    return _Contents(**{name: row[name] for name in names}) if row.keys() >= {*names} else None


def _difference_from_main(text: Text, row: dict[str, Any] | None, rank: int) -> str:
    """Return the error message about a text that differs from the main rank's: the first difference and the fix."""
    theirs, ours = _contents_of(row) if row else None, text.contents
    if row is None or theirs is None:
        return (
            f"{text.setting} is the text file {text.path.name} on rank {rank}, which rank 0 has not prepared; start "
            "all ranks with the same command, the same files and the same megaft."
        )
    if (ours.sha256, ours.num_bytes) != (theirs.sha256, theirs.num_bytes):
        return (
            f"{text.setting} is {text.path.name} ({_size(ours)}) on rank {rank}, but {row['file']} ({_size(theirs)}) "
            "on rank 0; give all ranks the same text, for example in a folder that the hosts share."
        )
    if ours.detokenizer != theirs.detokenizer:
        return (
            f"--data.detokenizer is {ours.detokenizer} on rank {rank}, but {theirs.detokenizer} on rank 0; start all "
            "ranks with the same command."
        )
    return (
        f"--data.tokenizer is {without_secrets(text.tokenizer_source)} ({_tokenizer(ours)}) on rank {rank}, but "
        f"{_tokenizer(theirs)} on rank 0; give all ranks the same tokenizer files."
    )


def _size(contents: _Contents) -> str:
    return f"{contents.num_bytes:,} bytes, SHA-256 {contents.sha256[:12]}"


def _tokenizer(contents: _Contents) -> str:
    return f"SHA-256 {contents.tokenizer_sha256[:12]}, opening_ids {contents.opening_ids}"
