"""Protocols as data: what each published system counts when it says "perplexity".

A protocol defines how a text is split into token windows and how nats are reduced to a number. It computes nothing:
`evaluation` reads the fields, `describe` prints them, and `differences` compares two protocols field by field. To add a
protocol, add a row to `_ALL`; it gives only the fields that differ from the defaults.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

Detokenizer = Literal["invertible", "megatron", "openai", "none"]
LastWord = Literal["strict", "last-token", "lm-eval", "stop-word"]
Text = Literal["tokens", "raw"]
"""Word-tokenized file of a task, or its raw file."""


class Words(StrEnum):
    """Divisor of the nats in word perplexity."""

    WHITESPACE = "whitespace"
    ORIGINAL = "original tokens"
    ADJUSTED = "original tokens, less one"
    """Megatron-LM's adjusted perplexity: the mean over scored tokens times the number of all tokens less one."""
    PER_DOCUMENT = "whitespace, per document"
    SPACES = "spaces"


@dataclass(frozen=True, kw_only=True, slots=True)
class Protocol:
    """Evaluation protocol: the rules by which a system computes a metric of a model on a corpus."""

    name: str
    title: str
    source: str
    """Publication of the definition."""
    text: Literal["tokens", "raw", "rows"] = "tokens"
    """Word-tokenized file, raw file, or raw file as the rows of its public dataset with blank lines between them."""
    scope: Literal["stream", "document", "page"] = "stream"
    """Unit that is detokenized and tokenized at once, and that no window crosses: the whole file, a document, or a page
    as lm-evaluation-harness splits WikiText."""
    detokenizer: Detokenizer = "none"
    """Rules that undo the corpus's word tokenization, if it has one."""
    has_prefix: bool = False
    """True if the beginning-of-text token precedes each scope, so that its first token is scored."""
    has_prompt_prefix: bool = False
    """True if it also precedes each prompt of LAMBADA and of the Children's Book Test."""
    context_length: int | None = None
    """Tokens of a window; None: all positions of the model."""
    stride: int | Literal["context", "half"] = "context"
    """Tokens from one window to the next: a number, the context length, or half of it."""
    window: Literal["inputs", "tokens"] = "inputs"
    """Unit of `context_length`: inputs of the model, or tokens of the window, the last of which is only a target."""
    first: Literal["full", "stride"] = "full"
    """Targets that the first window scores: all, or as many as a later one."""
    last: Literal["short", "extended"] = "short"
    """Last window: with a shorter context, or beginning earlier so that its context is full."""
    weighting: Literal["tokens", "windows"] = "tokens"
    """Mean in token perplexity: over tokens, or over windows, each weighted by its number of labels minus one."""
    words: Words = Words.WHITESPACE
    """Divisor of the nats in word perplexity."""
    headline: Literal["perplexity"] | None = None
    """Main metric of a text; None: the task's own."""
    exponent_limit: float | None = None
    """Cap on nats per token or word before exponentiation; None: no cap."""
    last_word: LastWord | None = None
    """LAMBADA's target and context; None: the system has no such task."""
    has_cloze: bool = False
    """True if the system chooses among candidates, as the Children's Book Test asks."""
    note: str
    """Further caveats in comparing its results."""

    @property
    def file_text(self) -> Text:
        """File that the protocol scores, where a task has a word-tokenized and a raw one."""
        return "tokens" if self.text == "tokens" else "raw"


_ALL = (
    Protocol(
        name="megaft",
        title="megaft",
        source="docs/evaluation.md",
        scope="document",
        detokenizer="invertible",
        has_prefix=True,
        has_prompt_prefix=True,
        stride="half",
        last="extended",
        last_word="lm-eval",
        has_cloze=True,
        note="Every token of every document is scored once, after a prefix token. The detokenizer is invertible, so "
        "the nats are those of the original text. Use bits per byte to compare models with different tokenizers. "
        "Training validates by this protocol.",
    ),
    Protocol(
        name="megatron",
        title="Megatron-LM zeroshot_gpt",
        source="NVIDIA/Megatron-LM tasks/zeroshot_gpt (removed in fb13c1de, 2025-07); arXiv:1909.08053 section 5.3",
        detokenizer="megatron",
        context_length=1024,
        stride=32,
        words=Words.ADJUSTED,
        exponent_limit=20.0,
        last_word="strict",
        note="Its adjusted perplexity is the word perplexity here: exp(nats / (T - 1) * (T - 1) / (T_o - 1)), with T "
        "tokens of the detokenized text and T_o = len(text.strip().split(' ')) words of the original text. For windows "
        "that do not overlap, use --stride 1024. When run data-parallel, the original repeats a few windows; megaft "
        "repeats none.",
    ),
    Protocol(
        name="lm-eval",
        title="lm-evaluation-harness",
        source="EleutherAI/lm-evaluation-harness 0.4.13: tasks wikitext and lambada_openai, get_rolling_token_windows",
        text="raw",
        scope="page",
        detokenizer="megatron",
        has_prefix=True,
        last="extended",
        words=Words.PER_DOCUMENT,
        last_word="lm-eval",
        note="The number of words is len(re.split(r'\\s+', page)), two more per page than str.split gives. Bytes and "
        "words are those of the page before detokenizing. In half precision the original also sums in half precision; "
        "megaft sums in float64.",
    ),
    Protocol(
        name="lm-eval-megatron",
        title="lm-evaluation-harness, megatron_lm backend",
        source="EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/models/megatron_lm.py",
        text="raw",
        scope="page",
        detokenizer="megatron",
        has_prefix=True,
        window="tokens",
        last="extended",
        words=Words.PER_DOCUMENT,
        last_word="lm-eval",
        note="As lm-eval, but each window has one input less.",
    ),
    Protocol(
        name="hf-docs",
        title="Hugging Face documentation, perplexity of fixed-length models",
        source="huggingface/transformers docs/source/en/perplexity.md",
        text="rows",
        stride=512,
        window="tokens",
        weighting="windows",
        headline="perplexity",
        note="Perplexity per token, comparable only between models with the same tokenizer. If the stride equals the "
        "context length, one token per window is never scored, and bits per byte cover the scored tokens only. The "
        "mean is over windows, each weighted by its number of labels minus one.",
    ),
    Protocol(
        name="fairseq",
        title="fairseq eval_lm",
        source="facebookresearch/fairseq fairseq_cli/eval_lm.py, fairseq/data/lm_context_window_dataset.py",
        has_prefix=True,
        context_length=1024,
        stride=32,
        first="stride",
        words=Words.ORIGINAL,
        note="The stride is fairseq's tokens_per_sample minus context_window. The recipe for Megatron-11B uses 1024 "
        "and 992, and converts 2 ** (bits per token) to perplexity per word. It also detokenizes with sacremoses, and "
        "fairseq ends each line with its own token instead of a newline; megaft does neither.",
    ),
    Protocol(
        name="lm-finetuning",
        title="lm-finetuning",
        source="the GPT-2 finetuning notes: Megatron's adjusted perplexity over non-overlapping chunks",
        detokenizer="megatron",
        context_length=1024,
        window="tokens",
        words=Words.ADJUSTED,
        note="The first token of a chunk is never scored. Word perplexity multiplies the mean over scored tokens by "
        "the number of all tokens less one; no other metric does. The original also averages batch means, scores "
        "padding and, in its later version, adds a special token before each chunk and counts it; megaft does none of "
        "these.",
    ),
    Protocol(
        name="gpt2-paper",
        title="GPT-2 paper, as far as it is known",
        source="Radford et al. 2019, Language Models are Unsupervised Multitask Learners, section 3.1",
        detokenizer="openai",
        context_length=1024,
        stride=32,
        words=Words.ADJUSTED,
        last_word="stop-word",
        has_cloze=True,
        note="The paper states invertible detokenizers, nats per canonical unit, and a stop-word filter for LAMBADA. "
        "An author later gave the stride, 32. Detokenizers, stop words and prefix are not published; megaft uses its "
        "own. No reproduction of its WikiText-103 perplexities is known. Its LAMBADA accuracies are closest to "
        "accuracy on the last token alone (task lambada-last-token).",
    ),
    Protocol(
        name="ralm",
        title="In-Context RALM, without retrieval",
        source="AI21Labs/in-context-ralm eval_lm.py; arXiv:2302.00083",
        context_length=1024,
        stride=4,
        window="tokens",
        words=Words.SPACES,
        note="Nats are divided by text.count(' ').",
    ),
    Protocol(
        name="olmo",
        title="catwalk, OLMo-Eval and Paloma",
        source="allenai/OLMo-Eval; Paloma, arXiv:2312.10523",
        scope="page",
        has_prefix=True,
        last="extended",
        words=Words.PER_DOCUMENT,
        note="Windows as in lm-eval, on text that is not detokenized. Compare bits per byte over all documents.",
    ),
)

PROTOCOLS: Mapping[str, Protocol] = {protocol.name: protocol for protocol in _ALL}

_PHRASES: dict[str, dict[Any, str]] = {
    "text": {
        "tokens": "the word-tokenized file if the corpus has one",
        "raw": "the raw file if the corpus has one",
        "rows": "the rows of the raw file, joined by blank lines",
    },
    "scope": {
        "stream": "the whole file as one stream",
        "document": "each document separately",
        "page": "each page separately, as lm-eval splits WikiText",
    },
    "detokenizer": {
        "invertible": "invertible rules",
        "megatron": "Megatron-LM's rules, which lose information",
        "openai": "OpenAI's rules where they are published, else invertible ones",
        "none": "none",
    },
    "has_prefix": {True: "before each scope; every token is scored", False: "none; the first token is not scored"},
    "has_prompt_prefix": {True: "before the context", False: "none"},
    "context_length": {None: "the model's own"},
    "stride": {"context": "the context length", "half": "half the context length"},
    "window": {"inputs": "inputs of the model", "tokens": "tokens, of which the last is only a target"},
    "first": {"full": "scores all its targets", "stride": "scores only one stride of targets"},
    "last": {"short": "has a shorter context", "extended": "begins earlier, so that its context is full"},
    "weighting": {"tokens": "over tokens", "windows": "over windows, each weighted by its number of labels minus one"},
    "words": {
        Words.WHITESPACE: "len(text.split())",
        Words.ORIGINAL: "len(text.strip().split(' '))",
        Words.ADJUSTED: "len(text.strip().split(' ')) - 1",
        Words.PER_DOCUMENT: "len(re.split(r'\\s+', page)), summed",
        Words.SPACES: "text.count(' ')",
    },
    "exponent_limit": {None: "none"},
    "last_word": {
        None: "not defined",
        "strict": "correct if every token of the last word is the greedy choice, given the preceding text, stripped",
        "last-token": "correct if the last token is the greedy choice, given all tokens before it",
        "lm-eval": "correct if every token of the last word with its space is the greedy choice, given the text before",
        "stop-word": "as strict, but stop words are excluded from the choices of the first token",
    },
    "has_cloze": {True: "likelihood of candidate and rest of the sentence, given the context", False: "not defined"},
}

_LABELS = {
    "text": "Text",
    "scope": "Scope",
    "detokenizer": "Detokenizer",
    "has_prefix": "Prefix token",
    "has_prompt_prefix": "Prefix token of a prompt",
    "context_length": "Context length",
    "stride": "Stride",
    "window": "The context length counts",
    "first": "First window",
    "last": "Last window",
    "weighting": "Mean",
    "words": "Words",
    "exponent_limit": "Cap of the exponent",
    "last_word": "LAMBADA",
    "has_cloze": "Children's Book Test",
}


def statements(protocol: Protocol) -> dict[str, str]:
    """Return every field that affects a metric, as label and phrase."""
    return {label: _phrase(protocol, field) for field, label in _LABELS.items()}


def _phrase(protocol: Protocol, field: str) -> str:
    value = getattr(protocol, field)
    return _PHRASES[field].get(value, str(value))


def describe(protocol: Protocol) -> str:
    """Return the whole definition as plain text."""
    width = max(map(len, _LABELS.values()))
    rows = [f"  {label:<{width}}  {phrase}" for label, phrase in statements(protocol).items()]
    return "\n".join([f"{protocol.name}: {protocol.title}", f"  {protocol.source}", "", *rows, "", protocol.note])


@dataclass(frozen=True, kw_only=True, slots=True)
class Difference:
    """Field in which two protocols differ, with the phrases for both values."""

    field: str
    ours: str
    theirs: str

    @property
    def label(self) -> str:
        """Printed name of the field."""
        return _LABELS[self.field]

    def __str__(self) -> str:
        return f"{self.label}: {self.ours}; published: {self.theirs}"


def differences(ours: Protocol, theirs: Protocol) -> list[Difference]:
    """Return the fields in which two protocols differ."""
    return [
        Difference(field=field, ours=first, theirs=second)
        for field in _LABELS
        if (first := _phrase(ours, field)) != (second := _phrase(theirs, field))
    ]
