"""Tokens, windows and word counts of a task, for one model under one protocol."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import detokenizers
import numpy as np

from evaluate_zero_shot.evaluation import counts
from evaluate_zero_shot.evaluation.geometry import Geometry
from evaluate_zero_shot.protocols import LastWord, Protocol
from evaluate_zero_shot.tasks import Task
from evaluate_zero_shot.texts import cbt, lambada, pages
from evaluate_zero_shot.texts.data_files import DataFile, read_records, read_text
from megaft.base import parallel
from megaft.base.errors import DataError
from megaft.data.tokenizer import AnyTokenizer
from megaft.scoring.score import Row, rows_of
from megaft.scoring.windows import Window


class TokenText:
    """Tokenized documents in memory."""

    def __init__(self, documents: Sequence[Sequence[int]]) -> None:
        self.document_offsets = np.array([0, *itertools.accumulate(map(len, documents))], np.int64)
        self.tokens = np.fromiter(itertools.chain.from_iterable(documents), np.int64, self.document_offsets[-1])

    def read(self, begin: int, end: int) -> np.ndarray:
        """Return tokens `begin` to `end` - 1."""
        return self.tokens[begin:end]


@dataclass(frozen=True, slots=True, kw_only=True)
class PreparedTask:
    """Tokens and rows to score, and the counts of the original text."""

    detokenizer: str
    tokens: TokenText
    rows: list[Row]
    prefix_id: int | None = None
    num_original_tokens: int
    num_words: int | None
    """Divisor of the nats in word perplexity."""
    num_bytes: int | None
    document_words: tuple[int, ...] | None = None
    """Words of each document; None if there is only one."""
    is_prompted: bool = False
    """True if each document is a prompt with a target, right or wrong."""
    banned: tuple[int, ...] = ()
    """Tokens that may not be chosen first: LAMBADA's stop words."""
    num_options: tuple[int, ...] = ()
    """Number of options of each question, which are consecutive documents; empty if there are no options."""
    answers: tuple[int, ...] = ()
    """Index of the right option of each question."""

    @property
    def has_untruncated_prompts(self) -> bool:
        """True if these are prompts, none of them truncated by the context length."""
        return self.is_prompted and not any(row.window.begin for row in self.rows)


def prepare(
    task: Task, protocol: Protocol, data: DataFile, limit_lines: int | None, tokenizer: AnyTokenizer, geometry: Geometry
) -> PreparedTask:
    """Read, detokenize, tokenize and window the data of a task.

    Raises:
        DataError: The data are not what the task needs.
    """
    assert task.is_defined_by(protocol)
    records = read_records(data, task, limit_lines)
    text = read_text(data, task, limit_lines) if records is None else "\n".join(records)
    detokenizer = task.detokenizer(protocol)
    if task.kind == "text":
        prepared = _text(text, records, task, protocol, detokenizer, tokenizer, geometry)
        if not prepared.rows:
            raise DataError(
                f"{data.path} is too short: --protocol {protocol.name} scores none of its tokens; give a longer text."
            )
        return prepared
    if task.kind == "last-word":
        variant = task.last_word or protocol.last_word
        assert variant is not None
        return _last_words(lambada.rows(text, data.path), variant, protocol, detokenizer, tokenizer, geometry)
    return _cloze(cbt.questions(text, data.path), protocol, detokenizer, tokenizer, geometry)


def _text(
    text: str,
    records: list[str] | None,
    task: Task,
    protocol: Protocol,
    detokenizer: str,
    tokenizer: AnyTokenizer,
    geometry: Geometry,
) -> PreparedTask:
    has_pages = task.unit == "page"
    if protocol.scope == "stream":
        documents = [pages.hf_rows(text) if protocol.text == "rows" and has_pages else text]
    elif protocol.scope == "page" and has_pages:
        documents = pages.wikitext_pages(text)
    else:
        documents = pages.documents(text, task) if records is None else records
    detokenize = detokenizers.get(detokenizer)
    texts = [detokenize(document) for document in documents]
    tokens = TokenText([tokenizer.encode(text) for text in texts])
    prefix_id = _prefix(tokenizer, protocol) if protocol.has_prefix else None
    return PreparedTask(
        detokenizer=detokenizer,
        tokens=tokens,
        rows=rows_of(tokens, geometry.windows, prefix_id=prefix_id),
        prefix_id=prefix_id,
        num_original_tokens=counts.num_original_tokens(text),
        num_words=counts.word_divisor(protocol, text, documents),
        num_bytes=sum(map(counts.num_bytes, documents if protocol.scope == "page" or records is not None else [text]))
        if _is_lossless(tokenizer, texts, tokens)
        else None,
        document_words=tuple(map(counts.num_words, documents)) if len(documents) > 1 else None,
    )


def _is_lossless(tokenizer: AnyTokenizer, texts: Sequence[str], tokens: TokenText) -> bool:
    """Return True if decoding restores the texts. If not, bytes are lost, and metrics per byte would be too low."""
    ends = itertools.pairwise(tokens.document_offsets)
    if all(tokenizer.decode(tokens.read(*end).tolist()) == text for text, end in zip(texts, ends, strict=True)):
        return True
    if parallel.is_main():
        print(
            "warning: the tokenizer loses text: decoding does not restore it, so metrics per byte are left out.",
            file=sys.stderr,
        )
    return False


def _last_words(
    rows: Sequence[str],
    variant: LastWord,
    protocol: Protocol,
    detokenizer: str,
    tokenizer: AnyTokenizer,
    geometry: Geometry,
) -> PreparedTask:
    detokenize = detokenizers.get(detokenizer)
    examples = lambada.examples([detokenize(row) for row in rows], variant)
    pairs = [encode_pair(tokenizer, *example) for example in examples]
    tokens, windows = _prompts(pairs, protocol, tokenizer, geometry)
    whole = TokenText([context + target for context, target in pairs])
    is_lossless = _is_lossless(tokenizer, [example.context + example.target for example in examples], whole)
    is_filtered = variant == "stop-word"
    stop_tokens = lambada.stop_tokens(lambda word: encode_pair(tokenizer, "a", word)[1]) if is_filtered else ()
    return PreparedTask(
        detokenizer=detokenizer,
        tokens=tokens,
        rows=windows,
        num_original_tokens=sum(counts.num_original_tokens(row) for row in rows),
        num_words=len(examples),
        is_prompted=True,
        num_bytes=(is_lossless and sum(counts.num_bytes(example.target) for example in examples)) or None,
        banned=tuple(sorted(stop_tokens)),
    )


def _cloze(
    questions: Sequence[cbt.Question], protocol: Protocol, detokenizer: str, tokenizer: AnyTokenizer, geometry: Geometry
) -> PreparedTask:
    options = [cbt.options(question) for question in questions]
    pairs = [encode_pair(tokenizer, *option) for option in itertools.chain.from_iterable(options)]
    tokens, rows = _prompts(pairs, protocol, tokenizer, geometry)
    return PreparedTask(
        detokenizer=detokenizer,
        tokens=tokens,
        rows=rows,
        num_original_tokens=len(questions),
        num_words=None,
        num_bytes=None,
        is_prompted=True,
        num_options=tuple(map(len, options)),
        answers=tuple(question.answer for question in questions),
    )


def encode_pair(tokenizer: AnyTokenizer, context: str, target: str) -> tuple[list[int], list[int]]:
    """Tokenize context and target as one text and split after the context's tokens, as lm-evaluation-harness does.

    Megatron-LM tokenizes each separately. With GPT-2's tokenizer the result is the same; sentencepiece would begin the
    target with a token of its own, which no model expects.

    Args:
        tokenizer: The model's tokenizer.
        context: Text without white space at its end, which belongs to the target.
        target: The continuation; empty: the context's own last token.
    """
    whole = tokenizer.encode(context + target)
    split = len(tokenizer.encode(context)) if target else -1
    return whole[:split], whole[split:]


def _prompts(
    pairs: Sequence[tuple[list[int], list[int]]], protocol: Protocol, tokenizer: AnyTokenizer, geometry: Geometry
) -> tuple[TokenText, list[Row]]:
    """Return one document and row for each pair: only the target is scored; a long context loses its beginning."""
    documents, rows, offset = [], [], 0
    for context, target in pairs:
        if protocol.has_prompt_prefix or not context:
            context = [_prefix(tokenizer, protocol), *context]
        end = len(context) + len(target)
        begin = max(0, end - 1 - geometry.num_inputs)
        if not target:
            raise DataError("a target has no token of its own after its context; use a model with another tokenizer.")
        if begin >= len(context):
            needed = len(target) + geometry.context_length - geometry.num_inputs
            raise DataError(
                f"{geometry.context_source} is {geometry.context_length}, but a target has {len(target)} tokens; use "
                f"--context-length {needed} or more, and a model with as many positions."
            )
        documents.append([*context, *target])
        rows.append(Row(offset, Window(begin, len(context), end)))
        offset += end
    return TokenText(documents), rows


def _prefix(tokenizer: AnyTokenizer, protocol: Protocol) -> int:
    if tokenizer.prefix_id is None:
        raise DataError(
            f"--protocol {protocol.name} needs a prefix token, but the tokenizer has neither a beginning- nor "
            "an end-of-sequence token; use one without a prefix, such as --protocol megatron."
        )
    return tokenizer.prefix_id
