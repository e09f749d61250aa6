"""`megaft tokenizer train`: train a tokenizer on text, and write it with a model's config.json."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import megaft
from megaft.base.files import to_json, write_json_atomic
from megaft.base.new_folder import publishing_folder, require_new
from megaft.base.plural import counted
from megaft.base.progress import progress_bar
from megaft.commands.tokenizer.config import TrainConfig
from megaft.data.corpus import TextLayout
from megaft.data.input_files import expand
from megaft.data.sentencepiece_folder import MODEL_NAME
from megaft.data.text_file import TextFile
from megaft.data.tokenizer import AnyTokenizer, load_tokenizer
from megaft.data.tokenizer_check import require_same_ids
from megaft.data.tokenizer_training import train_bpe, train_sentencepiece
from megaft.data.training_texts import Sample, texts_of

RECEIPT = "training.json"
"""File that records the training text and settings of a tokenizer."""
SETTINGS = ("kind", "vocab_size", "feed", "json_key", "end_of_text", "control_codes", "min_frequency", "max_bytes")


def main(config: TrainConfig) -> int:
    """Train, write the folder, print a summary, and return 0.

    Raises:
        ConfigError: The output exists or cannot be written.
        DataError: An input cannot be read, or does not suffice for the vocabulary.
    """
    require_new("--output", config.output)
    shape = _shape(config)
    sources = [TextFile(path, config.format) for path in expand(config.inputs, tell=_warn)]
    sample = Sample(sum(source.path.stat().st_size for source in sources), config.max_bytes)
    begin = time.perf_counter()
    with publishing_folder("--output", config.output) as folder:
        tokenizer = _write_tokenizer(config, _texts(config, sources, sample), folder, _positions(shape))
        receipt = _receipt(config, sources, sample, tokenizer)
        write_json_atomic(folder / RECEIPT, receipt)
        if shape is not None:
            write_model_config(folder, shape, tokenizer, config.pad_vocab_to)
        require_same_ids(tokenizer, folder)
    for line in _summary(config, receipt, time.perf_counter() - begin):
        print(line)
    if config.json:
        print(to_json(receipt))
    return 0


def write_model_config(folder: Path, shape: dict[str, Any], tokenizer: AnyTokenizer, multiple: int) -> None:
    """Write the config.json of a model with this shape and the tokenizer's vocabulary, rounded up to a multiple."""
    from transformers import CONFIG_MAPPING
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as NAMES

    settings: dict[str, Any] = shape | {
        f"{name}_token_id": tokenizer.special_ids[name] for name in ("bos", "eos", "pad")
    }
    vocab_size = -(-tokenizer.vocab_size // multiple) * multiple
    class_name = NAMES.get(shape["model_type"])
    classes = {"architectures": [class_name]} if class_name else {}
    config_class: Any = CONFIG_MAPPING[shape["model_type"]]
    config = config_class(**settings | classes | {"vocab_size": vocab_size})
    config.save_pretrained(folder)


def _shape(config: TrainConfig) -> dict[str, Any] | None:
    if config.model is None:
        return None
    from megaft.weights.presets import PRESETS, configuration

    name = config.model.lower()
    return configuration(name if name in PRESETS else config.model)


def _positions(shape: dict[str, Any] | None) -> int | None:
    names = ("n_positions", "max_position_embeddings")
    return None if shape is None else next((shape[name] for name in names if name in shape), None)


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


def _texts(config: TrainConfig, sources: list[TextFile], sample: Sample) -> Iterator[str]:
    by_lines = config.feed == "lines" or config.kind != "bpe"
    layout = TextLayout(text_key=config.json_key)
    with progress_bar(sample.stored_bytes, "bytes") as show:
        for text in sample.take(texts_of(sources, layout, by_lines=by_lines)):
            yield text
            if sample.num_texts % 1000 == 0:
                show(sum(source.num_bytes for source in sources))
        show(sum(source.num_bytes for source in sources))


def _write_tokenizer(config: TrainConfig, texts: Iterator[str], folder: Path, positions: int | None) -> AnyTokenizer:
    if config.kind == "bpe":
        _write_bpe(config, texts, folder, positions)
    else:
        algorithm = "bpe" if config.kind == "sentencepiece-bpe" else "unigram"
        model = train_sentencepiece(texts, algorithm, config.vocab_size, config.end_of_text, config.control_codes)
        (folder / MODEL_NAME).write_bytes(model)
        load_tokenizer(folder / MODEL_NAME).save(folder)
    return load_tokenizer(folder)


def _write_bpe(config: TrainConfig, texts: Iterator[str], folder: Path, positions: int | None) -> None:
    from transformers import PreTrainedTokenizerFast

    added = (config.end_of_text, *config.control_codes)
    backend = train_bpe(texts, config.vocab_size, added, config.min_frequency)
    backend.model.save(str(folder))  # vocab.json and merges.txt, for older readers
    ids = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1])
    (folder / "vocab.json").write_text(json.dumps(dict(ids), ensure_ascii=False), encoding="utf-8")
    special = dict.fromkeys(("bos_token", "eos_token", "unk_token"), config.end_of_text)
    length = {} if positions is None else {"model_max_length": positions}
    PreTrainedTokenizerFast(
        tokenizer_object=backend, clean_up_tokenization_spaces=False, **special, **length
    ).save_pretrained(folder)


def _receipt(config: TrainConfig, sources: list[TextFile], sample: Sample, tokenizer: AnyTokenizer) -> dict[str, Any]:
    entries = [source.receipt_entry() for source in sources]
    return {
        "megaft_version": megaft.__version__,
        "libraries": {name: version(name) for name in ("tokenizers", "sentencepiece")},
        **{name: getattr(config, name) for name in SETTINGS},
        "vocab_size_reached": tokenizer.vocab_size,
        "sha256": tokenizer.sha256,
        "special_ids": tokenizer.special_ids,
        "texts": sample.num_texts,
        "bytes": sample.num_bytes,
        "is_sample": sample.is_partial,
        "sources": [entry | {"path": Path(str(entry["path"])).name} for entry in entries],
    }


def _summary(config: TrainConfig, receipt: dict[str, Any], seconds: float) -> Iterator[str]:
    reached, asked = receipt["vocab_size_reached"], config.vocab_size
    yield (
        f"wrote {config.output}: {counted(reached, 'entry', 'entries')}, trained on {receipt['bytes']:,} bytes in "
        f"{seconds:.1f} s"
    )
    if reached < asked:
        yield (
            f"note: --vocab-size is {asked:,}, but no other pair occurs {config.min_frequency} times or more; give "
            "more text, or use this size."
        )
    if receipt["is_sample"]:
        yield f"note: --max-bytes is {config.max_bytes:,}, so the tokenizer was trained on a sample of the text."
