"""Load the samples of --data.train and --data.valid; a text file is prepared once, before training."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megaft.base.errors import ConfigError, DataError
from megaft.base.parallel import Topology
from megaft.config.data_source import parse_source
from megaft.config.train import DataConfig
from megaft.data.chat import template_sha256
from megaft.data.dataset import Dataset
from megaft.data.prepare import opening_ids_of
from megaft.data.receipt import is_prepared
from megaft.data.samples import DocumentSamples, PackedSamples
from megaft.data.sequence import Samples
from megaft.data.tokenizer import AnyTokenizer
from megaft.run.text_preparation import Text, prepare_for_others, wait_for_main


@dataclass(frozen=True, slots=True)
class Sources:
    """Prepared training and validation data of a run."""

    train: tuple[Dataset, ...]
    weights: tuple[float, ...]
    """Shares of the training datasets in the samples, in relation to each other."""
    valid: Dataset | None = None

    @property
    def all(self) -> tuple[Dataset, ...]:
        """The training datasets, and the validation text if there is one."""
        return self.train if self.valid is None else (*self.train, self.valid)


def prepare_sources(
    config: DataConfig, tokenizer_source: str, tokenizer: AnyTokenizer, run_dir: Path, topology: Topology
) -> Sources:
    """Return the prepared datasets of a run; the main rank tokenizes text files while the others wait.

    Raises:
        UserError: A text cannot be prepared, or differs from the main rank's.
    """
    train, folder = named_sources(config), run_dir / "data"
    named = [("--data.train", name) for _, name in train]
    if config.valid is not None:
        named.append(("--data.valid", config.valid))
    texts: dict[str, Text] = {}
    for setting, name in named:
        if name not in texts and not is_prepared(name):
            texts[name] = Text(setting, Path(name), tokenizer_source, tokenizer, config.detokenizer)
    if topology.is_main:
        ready = prepare_for_others([*texts.values()], folder, has_others=topology.world_size > 1)
    else:
        ready = wait_for_main([*texts.values()], folder, topology.rank)
    datasets = dict(zip(texts, ready, strict=True))

    def dataset(name: str) -> Dataset:
        return datasets.get(name) or Dataset(name)

    return Sources(
        tuple(dataset(name) for _, name in train),
        tuple(weight for weight, _ in train),
        None if config.valid is None else dataset(config.valid),
    )


def named_sources(config: DataConfig) -> list[tuple[float, str]]:
    """Return the inputs of --data.train with their weights, before text files are prepared.

    Raises:
        ConfigError: There are several datasets, and one has no weight.
        DataError: One of them, or --data.valid, is neither a prepared dataset nor a file.
    """
    named = [parse_source(name) for name in config.train]
    if len(named) > 1 and any(weight is None for weight, _ in named):
        raise ConfigError(f"--data.train is {' '.join(config.train)}; give each a weight, such as 0.7,books 0.3,wiki.")
    valid = [("--data.valid", config.valid)] if config.valid else []
    for setting, name in (*(("--data.train", name) for _, name in named), *valid):
        if not is_prepared(name) and not Path(name).is_file():
            raise DataError(_no_data(setting, name))
    return [(1.0 if weight is None else weight, name) for weight, name in named]


def _no_data(setting: str, name: str) -> str:
    """Return the message about a name that is not a dataset: a folder, to be prepared first, or a wrong path."""
    if not Path(name).is_dir():
        return (
            f"{setting} is {name}, which is neither a text file nor the prefix of prepared data "
            f"({name}.json and {name}.idx); check the path."
        )
    if prepared := sorted(Path(name).glob("*.idx")):
        return f"{setting} is {name}, a folder; give a prefix of prepared data, such as {prepared[0].with_suffix('')}."
    return (
        f"{setting} is {name}, a folder; tokenize its files once and give the prefix: "
        f"megaft prepare {name} --tokenizer MODEL --output PREFIX."
    )


def open_samples(sources: Sources, config: DataConfig, seed: int) -> Samples:
    """Return the sequence of samples the run trains on.

    Raises:
        DataError: A dataset has no token to predict, or none that is scored.
    """
    corpora = [
        DocumentSamples(dataset, config.context_length)
        if config.sample == "document"
        else PackedSamples(dataset, config.context_length, config.attend_within_documents)
        for dataset in sources.train
    ]
    for dataset, corpus in zip(sources.train, corpora, strict=True):
        if len(corpus) == 0 and corpus.num_unscored_samples > 0:
            raise DataError(
                f"--data.train has {dataset.prefix}, of which no token is scored: its completions are empty, or no "
                "message has the role assistant. Correct the records, and run megaft prepare again."
            )
        if len(corpus) == 0:
            raise DataError(f"{dataset.prefix} has no document of two tokens or more; give --data.train a longer text.")
    return Samples(corpora, sources.weights, seed)


def notes_on_lengths(sources: Sources, samples: Samples) -> list[str]:
    """Return a sentence for each dataset on documents longer than the context."""
    if samples.is_packed:
        return []
    notes, context = [], samples.context_length
    for dataset, corpus in zip(sources.train, samples.corpora, strict=True):
        lengths = np.diff(corpus.tokens.document_offsets) - 1
        num_longer, longest = int((lengths > context).sum()), int(lengths.max(initial=0))
        notes.append(
            f"{dataset.prefix}: {num_longer:,} of {len(lengths):,} documents are longer than --data.context-length, "
            f"{context}, and are cut; the longest has {longest:,} tokens to predict."
        )
    return notes


def notes_on_unscored(sources: Sources, samples: Samples) -> list[str]:
    """Return a sentence for each dataset with samples without a scored token, which are not trained on."""
    notes = []
    for dataset, corpus in zip(sources.train, samples.corpora, strict=True):
        if corpus.num_unscored_samples:
            num_all = len(corpus) + corpus.num_unscored_samples
            notes.append(
                f"{dataset.prefix}: {corpus.num_unscored_samples:,} of {num_all:,} samples have no scored token within "
                "--data.context-length tokens, as where a prompt is longer, and are not trained on."
            )
    return notes


def notes_on_templates(sources: Sources, tokenizer: AnyTokenizer) -> list[str]:
    """Return a warning for each dataset whose chat template differs from the tokenizer's."""
    notes = []
    for dataset in sources.all:
        made_with = dataset.receipt.get("chat_template_sha256")
        if made_with is None or made_with == template_sha256(tokenizer.chat_template):
            continue
        has = "has none" if tokenizer.chat_template is None else "has another, which the export would contain"
        notes.append(
            f"warning: the chats of {dataset.prefix} were rendered by the chat template of SHA-256 {made_with[:12]}, "
            f"but the run's tokenizer {has}; pass the tokenizer used for the chats with --data.tokenizer."
        )
    return notes


def require_same_tokenizer(sources: Sources, tokenizer: AnyTokenizer) -> None:
    """Raise DataError for a dataset that was prepared with another tokenizer."""
    for dataset in sources.all:
        receipt = dataset.receipt
        made_with = receipt["tokenizer"]
        if made_with["sha256"] != tokenizer.sha256:
            raise DataError(
                f"{dataset.prefix} was prepared with the tokenizer {made_with['source']} "
                f"(SHA-256 {made_with['sha256'][:12]}), but the run's tokenizer has "
                f"{tokenizer.sha256[:12]}; prepare the data again with the run's tokenizer, or pass the data's "
                "tokenizer with --data.tokenizer."
            )
        _require_same_opening(dataset.prefix, receipt, tokenizer)


def _require_same_opening(prefix: str, receipt: dict[str, Any], tokenizer: AnyTokenizer) -> None:
    is_old = "opening_ids" not in receipt
    if is_old and receipt["has_mask"]:
        raise DataError(
            f"{prefix} has no opening_ids in its receipt: an older megaft tokenized its prompts, completions and chat "
            "turns separately; run megaft prepare again."
        )
    receipt_ids = receipt.get("opening_ids", [])
    wanted = list(opening_ids_of(tokenizer, is_chat=receipt["messages_key"] is not None))
    if receipt_ids != wanted:
        raise DataError(
            f"documents of {prefix} begin with {_named(receipt_ids, tokenizer)} (opening_ids of its receipt), but "
            f"the run's tokenizer puts {_named(wanted, tokenizer)} before every text. Prepare it again with that "
            "tokenizer, or set --data.tokenizer to the one it was prepared with."
        )


def _named(ids: Sequence[int], tokenizer: AnyTokenizer) -> str:
    return f"{ids} ({tokenizer.decode(ids)})" if ids else "no special token"
