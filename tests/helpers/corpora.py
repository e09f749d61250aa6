"""Corpora in the formats of WikiText, Penn Treebank, LAMBADA and others, made from Python's documentation.

Word tokenization follows that of each corpus; `articles` and `sentences` have the text before it. Nothing here imports
megaft.
"""

import json
import random
import re
from collections import Counter
from functools import cache
from pathlib import Path

TITLE = re.compile(r"([^\n]+)\n(\*{3,}|={3,}|-{3,})")
ITEM = re.compile(r"(\* |\d+\. )")
SENTENCE_END = re.compile(r'(?:(?<=[.?!])|(?<=[.?!]["”)]))(?<!e\.g\.)(?<!i\.e\.)\s+(?=[A-Z“"(])')


@cache
def articles() -> tuple[tuple[str, tuple[tuple[str, tuple[str, ...]], ...]], ...]:
    """Return (title, sections) of every topic with prose; a section is (title or "", paragraphs)."""
    from pydoc_data.topics import topics

    found = []
    for name in sorted(topics):
        sections = [(title, tuple(paragraphs)) for title, paragraphs in _sections(topics[name]) if paragraphs]
        if sections:
            found.append((sections[0][0] or name, (("", sections[0][1]), *sections[1:])))
    return tuple(found)


def _sections(topic: str) -> list[tuple[str, list[str]]]:
    sections: list[tuple[str, list[str]]] = [("", [])]
    for block in topic.split("\n\n"):
        if title := TITLE.fullmatch(block.strip()):
            sections.append((title[1].strip(), []))
        elif is_prose(text := " ".join(ITEM.sub("", block.strip(), 1).split())):
            sections[-1][1].append(text)
    return sections


def is_prose(text: str) -> bool:
    """Return True for English sentences, and False for code, grammars and tables."""
    is_sentence = re.match(r"[A-Z“]", text) and re.search(r"[.:?!]$", text) and text.count(" ") > 5
    return bool(is_sentence) and not re.search(r"::=|>>>|--|==|\||\^|~|\\|[ (]@|_ |[+<>*/={}#%&]", text)


def paragraphs() -> list[str]:
    """Return the original paragraphs of all articles, in order."""
    return [text for _, sections in articles() for _, texts in sections for text in texts]


@cache
def sentences() -> tuple[str, ...]:
    """Return the original sentences of all articles, in order."""
    return tuple(sentence for text in paragraphs() for sentence in SENTENCE_END.split(text))


def plain_quotes(text: str) -> str:
    return re.sub(r"[“”]", '"', text).replace("\u2019", "'")


def words_apart(text: str) -> str:
    """Return a text tokenized like Moses: punctuation and clitics are separate words."""
    text = re.sub(r'(["()\[\]?!;:]|,(?!\d)|\.\.\.)', r" \1 ", plain_quotes(text))
    text = re.sub(r"(?<=\w)'(?=\w)", " '", text)
    text = re.sub(r"(?<!\S)'(?=\w)(?!(?:s|t|re|ve|ll|d|m)\b)|(?<=\w)'(?!\w)", " ' ", text)
    return " ".join(re.sub(r"\.(?=\s*$)|\.(?= [\")\]]*\s*$)", " . ", text).split())


def wikitext_words(text: str) -> str:
    """Return a paragraph in WikiText's word tokenization: hyphens and signs within numbers are marked by @."""
    text = " ".join(map(words_apart, SENTENCE_END.split(text)))
    text = re.sub(r"(?<=\w)-(?=\w)", " @-@ ", text)
    return re.sub(r"(?<=\d)([,.])(?=\d)", r" @\1@ ", text)


def wikitext(rarest: int = 1) -> str:
    """Return all articles in WikiText's format, with <unk> for words that occur fewer than `rarest` times."""
    text = "".join(_page(title, sections) for title, sections in articles()) + " \n"
    return rare_as_unknown(text, rarest)


def _page(title: str, sections) -> str:
    lines = [f" \n = {wikitext_words(title)} = \n \n"]
    for section, paragraphs in sections:
        lines += [f" \n = = {wikitext_words(section)} = = \n \n"] if section else []
        lines += [f" {wikitext_words(text)} \n" for text in paragraphs]
    return "".join(lines)


def rare_as_unknown(text: str, rarest: int) -> str:
    counts = Counter(text.split())
    return re.sub(r"(?<=[ \n])[A-Za-z_]\S+", lambda word: word[0] if counts[word[0]] >= rarest else "<unk>", text)


def penn_treebank() -> str:
    """Return one sentence per line in Mikolov's preprocessing: lower case, no punctuation, numbers as N."""
    lines = []
    for sentence in sentences():
        text = re.sub(r"(?<=\w)n't\b", " n't", sentence.lower().replace("\u2019", "'"))
        text = re.sub(r"(?<=\w)'(?=(?:s|re|ve|ll|d|m)\b)", " '", text)
        text = re.sub(r"\b\d[\d.,]*\b", "N", re.sub(r"[^\w\s.'-]|\.(?=\s|$)|_", " ", text))
        lines.append(f" {' '.join(text.split())} \n")
    return rare_as_unknown("".join(lines), 2)


def one_billion_words() -> str:
    """Return tokenized sentences in random order, one per line."""
    lines = [words_apart(sentence) + "\n" for sentence in sentences()]
    random.Random(0).shuffle(lines)
    return "".join(lines)


def text8(num_characters: int = 100_000) -> str:
    """Return a text of only the letters a to z and spaces."""
    return re.sub(r"[^a-z]+", " ", " " + " ".join(sentences()).lower())[:num_characters]


def passages() -> list[str]:
    """Return passages as LAMBADA's: the last word, which stands earlier too, ends them without a full stop.

    In every twentieth a line break comes before that word: there the protocols differ.
    """
    found = []
    texts = sentences()
    for at in range(4, len(texts)):
        passage = re.sub(r'[.?!:")”]+$', "", "\n\n".join([" ".join(texts[at - 4 : at - 1]), texts[at]]))
        before, _, last = passage.rpartition(" ")
        if last.isalpha() and len(last) > 3 and f" {last} " in before:
            found.append(f"{before}\n{last}" if len(found) % 20 == 19 else passage)
    return found


def lambada() -> str:
    """Return the passages as JSON lines."""
    return "".join(json.dumps({"text": passage}) + "\n" for passage in passages())


def book() -> str:
    """Return all topics and their code in Project Gutenberg's format: a byte-order mark and CRLFs."""
    from pydoc_data.topics import topics

    return "\ufeff" + "\n\n".join(topics[name].strip() for name in sorted(topics)).replace("\n", "\r\n") + "\r\n"


def childrens_book_test(num_questions: int = 40) -> str:
    """Return questions of twenty numbered sentences and one with a blank, with ten candidates."""
    texts = [words_apart(sentence) for sentence in sentences()]
    nouns = sorted(
        {word for text in texts for word in text.split() if word.isalpha() and word.islower() and len(word) > 5}
    )
    draw = random.Random(0)
    questions = []
    for begin in range(0, len(texts) - 21, 21):
        *context, query = texts[begin : begin + 21]
        answer = next((word for word in query.split()[1:-1] if word in nouns), None)
        if answer is not None and len(questions) < num_questions:
            candidates = [*draw.sample([noun for noun in nouns if noun != answer], 9), answer]
            draw.shuffle(candidates)
            blank = " ".join(query.split()).replace(f" {answer} ", " XXXXX ", 1)
            context.append(f"{blank}\t{answer}\t\t{'|'.join(candidates)}")
            questions.append("".join(f"{number} {line}\n" for number, line in enumerate(context, 1)))
    return "\n".join(questions)


def write(folder: Path) -> Path:
    """Write every corpus at the path of the published one, and return the folder."""
    texts = {
        "wikitext103/wiki.test.tokens": wikitext(2),
        "wikitext2/wiki.test.tokens": wikitext(4),
        "wikitext2_raw/wiki.test.raw": wikitext(),
        "ptb/ptb.test.txt": penn_treebank(),
        "lambada/lambada_test.jsonl": lambada(),
        "cbt/cbtest_CN_valid_2000ex.txt": childrens_book_test(),
        "1bw/news.en.heldout-00000-of-00050": one_billion_words(),
        "text8/text8": text8(),
        "book.txt": book(),
        "plain.txt": "\n\n".join(paragraphs()) + "\n",
    }
    for name, text in texts.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="\n")
    return folder
