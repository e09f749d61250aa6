"""Tokenize a corpus to disk and write a receipt with its sources, tokenizer, settings and counts."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from dataclasses import asdict
from itertools import chain
from pathlib import Path
from typing import Any

import detokenizers

import megaft
from megaft.base.errors import ConfigError, DataError
from megaft.base.files import naming_disk_errors, sha256_of
from megaft.base.plural import counted
from megaft.base.progress import progress_bar
from megaft.config.prepare import DEFAULT_KEY, PrepareConfig
from megaft.data import prepare_report
from megaft.data.chat import SCORED_ROLE, Renderer, template_sha256
from megaft.data.corpus import Chunk, TextLayout, chunks, with_control_code
from megaft.data.dataset import Dataset
from megaft.data.document_writer import Counts, DocumentWriter
from megaft.data.encoding import Encoder
from megaft.data.indexed import with_suffix
from megaft.data.input_files import expand
from megaft.data.receipt import FORMAT_VERSION, SUFFIXES, publish, publishing
from megaft.data.text_file import TextFile
from megaft.data.tokenizer import AnyTokenizer, load_tokenizer

_TEXT_SETTINGS = (
    *("unit", "json_key", "prompt_key", "completion_key", "messages_key", "detokenizer", "min_tokens"),
    *("control_codes", "format"),
)


def prepare(config: PrepareConfig, tokenizer: AnyTokenizer | None = None) -> dict[str, Any]:
    """Tokenize the inputs and publish the dataset; return its receipt.

    Memory does not grow with the corpus, only with documents that are detokenized or cannot be encoded in chunks.

    Args:
        config: Inputs, settings and output.
        tokenizer: `config.tokenizer`, if it is already loaded.

    Raises:
        DataError: An input or the tokenizer is invalid, or no document is left to write.
        ConfigError: The output cannot be written, or another process is writing it.
    """
    sources = _sources(config)
    _require_inputs_kept(config, list(sources))
    _check_keys(config, list(sources))
    if config.workers is not None:
        os.environ["RAYON_NUM_THREADS"] = str(config.workers)  # read at the first batch of the process
    tokenizer = tokenizer or load_tokenizer(config.tokenizer)
    _check_codes(config, tokenizer)
    with naming_disk_errors(config.output):
        config.output.parent.mkdir(parents=True, exist_ok=True)
        with publishing(config.output):
            receipt = _write(config, sources, tokenizer)
            publish(config.output, receipt)
    return receipt


def ensure_prepared(
    text_path: Path, prefix: Path, tokenizer_source: str, tokenizer: AnyTokenizer, detokenizer: str = "identity"
) -> Dataset:
    """Prepare one file as one document (or the texts of one .jsonl), unless the prefix already has the same dataset.

    Args:
        text_path: The file.
        prefix: Prefix of the dataset.
        tokenizer_source: Name of the tokenizer, for the receipt.
        tokenizer: The loaded tokenizer.
        detokenizer: Detokenizer for the corpus.

    Raises:
        DataError, ConfigError: As `prepare`.
    """
    config = PrepareConfig(
        inputs=(str(text_path),), output=Path(prefix), tokenizer=str(tokenizer_source), detokenizer=detokenizer
    )
    dataset = Dataset(str(prefix))
    if _is_current(dataset, config, tokenizer):
        return dataset
    prepare(config, tokenizer)
    return Dataset(str(prefix))


def _sources(config: PrepareConfig) -> dict[TextFile, str]:
    """Return the input files in order, each with its control code."""
    sources: dict[TextFile, str] = {}
    paths: set[Path] = set()
    for name, code in zip(config.inputs, config.control_codes or [""] * len(config.inputs), strict=True):
        files = [TextFile(path, config.format) for path in expand([name], tell=_warn)]
        _warn_of_mixed_formats(name, files)
        sources |= {file: code for file in files if config.control_codes or file.path not in paths}
        paths |= {file.path for file in files}
    return sources


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


def _warn_of_mixed_formats(name: str, sources: list[TextFile]) -> None:
    """Warn about an input that mixes texts and JSON records, such as a README beside JSON lines."""
    texts = [source.path for source in sources if source.format == "text"]
    if texts and len(texts) < len(sources):
        records = next(source.path for source in sources if source.format != "text")
        _warn(f"warning: {name} mixes {counted(len(texts), 'text file')} ({texts[0]}) with JSON records ({records}).")


def _require_inputs_kept(config: PrepareConfig, sources: list[TextFile]) -> None:
    """Refuse an output that would overwrite an input: with --output x, an input x.json would become the receipt."""
    written = {with_suffix(config.output, suffix).resolve() for suffix in (".json", *SUFFIXES)}
    if overwritten := [source.path for source in sources if source.path.resolve() in written]:
        raise ConfigError(
            f"--output {config.output} would overwrite the input {overwritten[0]}; give another prefix, such as "
            f"{config.output}-tokens."
        )


def _check_keys(config: PrepareConfig, sources: list[TextFile]) -> None:
    key = config.messages_key or config.prompt_key or config.json_key
    texts = [source.path for source in sources if source.format == "text"]
    if key is not None and texts:
        raise DataError(
            f"{texts[0]} has no JSON records, so the key {key!r} has no effect on it; prepare it separately."
        )
    if config.unit != "file" and not texts:
        raise DataError(
            f"--unit is {config.unit}, which has no effect on {sources[0].path}: each JSON record is a document; "
            "drop --unit."
        )


def _check_codes(config: PrepareConfig, tokenizer: AnyTokenizer) -> None:
    for code in config.control_codes:
        ids = tokenizer.encode(code)
        if len(ids) != 1 or tokenizer.encode(f"{code} a")[:1] != ids:
            shown = " ".join(repr(tokenizer.decode([id_])) for id_ in ids)
            raise DataError(
                f"--control-codes has {code!r}, which is {len(ids)} tokens ({shown}) in {config.tokenizer}; use a code "
                "that is a single token."
            )


def _write(config: PrepareConfig, sources: dict[TextFile, str], tokenizer: AnyTokenizer) -> dict[str, Any]:
    eod_id = tokenizer.eos_id if config.append_eod else None
    if config.append_eod and eod_id is None:
        raise DataError(
            f"--tokenizer is {config.tokenizer}, which has no end-of-sequence token for --append-eod; drop that, "
            "or use another tokenizer."
        )
    opening_ids = opening_ids_of(tokenizer, is_chat=config.messages_key is not None)
    renderer = Renderer(tokenizer.apply_chat_template)
    layout = _layout(config, renderer)

    def chunks_of(source: TextFile, code: str) -> Iterator[Chunk]:
        parts = chunks(source, layout, can_split=tokenizer.splits_at_spaces)
        return with_control_code(parts, code) if code else parts

    encode = Encoder(tokenizer)
    num_bytes = sum(source.path.stat().st_size for source in sources)
    with (
        DocumentWriter(
            config.output,
            tokenizer.vocab_size,
            has_mask=config.has_mask,
            min_tokens=config.min_tokens,
            opening_ids=opening_ids,
            eod_id=eod_id,
        ) as writer,
        progress_bar(num_bytes, "bytes") as show,
    ):
        for batch in encode(chain.from_iterable(chunks_of(source, code) for source, code in sources.items())):
            for encoded in batch:
                writer.add(encoded)
            show(sum(source.num_bytes for source in sources))
        bin_sha256 = writer.close()
    _warn_of_changes(list(sources))
    _require_scored(config, writer, set(renderer.turns))
    receipt = {
        "format_version": FORMAT_VERSION,
        "megaft_version": megaft.__version__,
        "tokenizer": {
            "source": config.tokenizer,
            "sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "round_trip": encode.is_lossless,
        },
        "opening_ids": list(opening_ids),
        "eod_id": eod_id,
        **_text_settings(config, list(sources)),
        "dtype": writer.dtype.name,
        "has_mask": config.has_mask,
        **_counts(list(sources), writer.counts),
        **(_chat_fields(tokenizer, renderer) if config.messages_key is not None else {}),
        "bin_sha256": bin_sha256,
    }
    for warning in [*renderer.warnings(), *prepare_report.warnings(receipt)]:
        _warn(f"warning: {warning}")
    return receipt


def _counts(sources: list[TextFile], counts: Counts) -> dict[str, Any]:
    return {
        "sources": [source.receipt_entry() for source in sources],
        **asdict(counts),
        "scored_share": round(counts.scored_tokens / counts.tokens, 6),
        "documents_blank": sum(source.blank_records for source in sources),
        "first_blank": next((source.first_blank for source in sources if source.first_blank), None),
        "byte_order_marks": sum(source.byte_order_marks for source in sources),
        "crlfs": sum(source.crlfs for source in sources),
    }


def _chat_fields(tokenizer: AnyTokenizer, renderer: Renderer) -> dict[str, Any]:
    return {
        "chat_template_sha256": template_sha256(tokenizer.chat_template),
        "turns": dict(sorted(renderer.turns.items())),
        "turns_of_weight_0": renderer.weight_0,
        "turns_without_text": renderer.empty,
    }


def opening_ids_of(tokenizer: AnyTokenizer, *, is_chat: bool) -> tuple[int, ...]:
    """Return the special tokens put before each document: the tokenizer's own; none for chats, as templates add them.

    The ids are those of transformers' `tokenizer(text)` and `apply_chat_template(messages)`.
    """
    return () if is_chat else tokenizer.opening_ids


def _require_scored(config: PrepareConfig, writer: DocumentWriter, roles: set[str]) -> None:
    if writer.counts.documents == 0:
        fix = "lower --min-tokens" if config.min_tokens > 1 else "give files with text"
        least = counted(config.min_tokens, "token")
        raise DataError(f"no document of {' '.join(config.inputs)} has {least} or more; {fix}.")
    if writer.counts.documents_unscored < writer.counts.documents:
        return
    if SCORED_ROLE in roles:
        raise DataError(
            f"no token of {' '.join(config.inputs)} would be scored: every turn of role {SCORED_ROLE!r} has weight "
            "0, or neither text nor an end of turn; give turns to train on."
        )
    if config.messages_key is not None:
        raise DataError(
            f"no token of {' '.join(config.inputs)} would be scored: only turns of role {SCORED_ROLE!r} are, but "
            f"--messages-key {config.messages_key} has the roles {', '.join(map(repr, sorted(roles)))}; rename the "
            "role that answers."
        )
    raise DataError(
        f"no token of {' '.join(config.inputs)} would be scored: every --completion-key {config.completion_key} is "
        "empty; give the key of a text to train on."
    )


def _warn_of_changes(sources: list[TextFile]) -> None:
    for source in sources:
        if source.byte_order_marks:
            print(f"warning: {source.path} begins with a byte order mark, which was removed.", file=sys.stderr)
        if source.crlfs:
            print(
                f"warning: {source.path} has {source.crlfs:,} CRLF line endings, which were changed to LF.",
                file=sys.stderr,
            )


def _layout(config: PrepareConfig, renderer: Renderer) -> TextLayout:
    return TextLayout(
        unit=config.unit,
        text_key=config.json_key or DEFAULT_KEY,
        prompt_key=config.prompt_key,
        completion_key=config.completion_key,
        messages_key=config.messages_key,
        detokenize=None if config.detokenizer == "identity" else detokenizers.get(config.detokenizer),
        render=renderer,
    )


def _text_settings(config: PrepareConfig, sources: list[TextFile]) -> dict[str, Any]:
    """Return the settings that determined the text, None for unused ones, and the kind of text that was counted."""
    formats = {source.format for source in sources}
    has_records = not formats <= {"text"}
    reads_text = config.prompt_key is None and config.messages_key is None
    values = {name: getattr(config, name) for name in _TEXT_SETTINGS}
    values["unit"] = config.unit if "text" in formats else None
    values["json_key"] = (config.json_key or DEFAULT_KEY) if has_records and reads_text else None
    values["words_and_bytes_of"] = _counted(config)
    return values | {"control_codes": list(config.control_codes)}  # as JSON gives them back


def _counted(config: PrepareConfig) -> str:
    """Name the text whose words and bytes are counted; only those of whole texts normalize perplexities."""
    if config.messages_key is not None:
        return "contents of scored turns"
    return "texts" if config.completion_key is None else "completions"


def _is_current(dataset: Dataset, config: PrepareConfig, tokenizer: AnyTokenizer) -> bool:
    try:
        receipt = dataset.receipt
    except DataError:
        return False
    opening_ids = opening_ids_of(tokenizer, is_chat=config.messages_key is not None)
    paths = expand(config.inputs)
    text_settings = _text_settings(config, [TextFile(path, config.format) for path in paths])
    settings = {"eod_id": None, "opening_ids": list(opening_ids), **text_settings}
    return (
        settings.items() <= receipt.items()
        and [source["sha256"] for source in receipt.get("sources", [])] == [sha256_of(path) for path in paths]
        and receipt["tokenizer"]["sha256"] == tokenizer.sha256
    )
