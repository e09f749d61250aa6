"""Moses tokenization of English, which WikiText and the One Billion Word Benchmark share."""

import re

_ABBREVIATION = re.compile(
    r"(?:^|[-/])(?:[A-Za-z]|(?:\w\.)+\w|St|Mr|Mrs|Ms|Dr|Jr|Sr|vs|[Nn]os?|Lt|Col|Gen|Sgt|Capt|Maj|Gov|Sen|Reps?|Rev|Prof"
    r"|etc|Inc|Ltd|Co|Corp|[Ff]t|Mt|Op|ca|cf|al|approx|pp|[Vv]ol|Ph\.D|Bros|Adm|Cmdr|Brig|Pvt|Cpl|Hon|Sec|Supt|var|Nr"
    r"|Jan|Feb|Aug|Sept|Oct|Nov|Dec)$"
)
_OPENING, _CLOSING = "([{\"'$£", ".,;:!?)]}\"'%"
_SUFFIX = re.compile(r"\.{2,}|.", re.DOTALL)
_CLITIC = re.compile(r"'[^\W\d_]+")
_SPLITS = (
    (re.compile(r"(?<=[^\W\d_])(?='[^\W\d_])|(?<=.)(?='s$)"), " "),
    (re.compile(r"(?<=\w)/(?=\w)"), " / "),
    (re.compile(r"(?<=\d)(?=°)|(?<=\d°)(?=[CF]$)"), " "),
)
_QUOTED = re.compile(r'(?<= )" (.*?) "(?= )')
_APOSTROPHE_OR_QUOTED = re.compile(r"(?<=s) '(?=[ \n])|(?<=[ \n])' (.+?) '(?=[ \n])", re.DOTALL)
_JOINTS = re.compile(
    r" (?=[.,;:!?)\]}%][ \n])|(?<=[ \n][(\[{$£]) "  # punctuation, brackets, currencies
    r"|(?<=[^\W\d_]) (?='[^\W\d_])| (?='s[ \n])"  # clitics, and names such as O 'Brien
    r"| (?=@[-,.]@[ \n])|(?<=[ \n]@[-,.]@) "  # WikiText's marks for what stood inside a word
    r"|(?<=[ \n]=) (?==[ \n])"  # headings
    r"|(?<=\w) (?=/ \w)|(?<=\w[ \n]/) (?=\w)|(?<=\d) (?=° )|(?<=\d[ \n]°) (?=[CF][ \n])"
)


def mark_joints(line: str) -> str:
    """Replace by a newline each space that ordinary English would not have; quotes are paired within the line."""
    line = _QUOTED.sub('"\n\\1\n"', f" {line} ")
    line = _APOSTROPHE_OR_QUOTED.sub(lambda match: "\n'" if match[1] is None else f"'\n{match[1]}\n'", line)
    return _JOINTS.sub("\n", line)[1:-1]


def split(word: str) -> str:
    """Return the tokens of a word, with a space between them: punctuation, quotes and clitics are tokens of their own.

    A full stop stays with an abbreviation.
    """
    if _CLITIC.fullmatch(word):
        return word
    core = word.lstrip(_OPENING)
    prefix = word[: len(word) - len(core)]
    stem = core.rstrip(_CLOSING)
    suffix = core[len(stem) :]
    if suffix[:1] == "." and suffix[:2] != ".." and _ABBREVIATION.search(stem):
        stem, suffix = stem + ".", suffix[1:]
    for pattern, spaced in _SPLITS:
        stem = pattern.sub(spaced, stem)
    return " ".join((*prefix, *([stem] if stem else []), *_SUFFIX.findall(suffix)))
