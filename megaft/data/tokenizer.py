"""Tokenizers: encode and decode text, with special tokens only where the text spells them, and hash the vocabulary."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaft.base.errors import ChatTemplateError, DataError
from megaft.base.files import read_json
from megaft.base.hub import find_file_if_any
from megaft.base.untrusted import require_safe_files
from megaft.data import sentencepiece_folder
from megaft.data.sentencepiece_folder import BESIDE, MODEL_NAME, additions, is_saved_model
from megaft.data.transformers_tokenizer import from_pretrained, naming_errors, require_usable

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]
Span = tuple[int, int]
"""Character offsets [begin, end) of a token in the text; empty for a token that covers no character."""
UNSUPPORTED_FILES = (
    "tekken.json",
    "tiktoken.model",
    "vocab.txt",
    "spiece.model",
    "spm.model",
    "sentencepiece.bpe.model",
)
"""Tokenizer files that transformers supports and megaft does not."""
MAX_TOKEN_ID = 10_000_000
"""Largest token id accepted: `tokenizers` allocates memory up to the largest id."""
SPECIAL_NAMES = ("bos", "eos", "pad", "unk")


class Tokenizer:
    """A tokenizer of the `tokenizers` library, with the special tokens and chat template of transformers."""

    def __init__(self, hugging_face: PreTrainedTokenizerFast) -> None:
        self._hugging_face = hugging_face
        # The backend adds no special tokens and does not warn about sequences longer than the model's context.
        self._backend: tokenizers.Tokenizer = hugging_face.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.special_ids = {name: _single_id(getattr(hugging_face, f"{name}_token_id")) for name in SPECIAL_NAMES}
        self.bos_id, self.eos_id = self.special_ids["bos"], self.special_ids["eos"]

    @property
    def prefix_id(self) -> int | None:
        """Token that scoring puts before a document: beginning-of-sequence, else end-of-sequence."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @cached_property
    def vocab_size(self) -> int:
        """Largest id plus one, including added tokens."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of everything that determines ids; independent of where the tokenizer was loaded from."""
        content = {key: self._state[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @cached_property
    def splits_at_spaces(self) -> bool:
        """True if encoding chunks of a text, split before any space or newline that follows a non-space, is exact.

        In GPT-2's pre-tokenizer no match has white space after a non-space, so every match ends before such white
        space, and `\\s+(?!\\S)`, which looks ahead, starts at it. False for other pre-tokenizers, for
        normalizers, and for added tokens that contain or strip white space.
        """
        pre: dict[str, Any] = self._state["pre_tokenizer"] or {"type": None}
        steps: list[dict[str, Any]] = pre["pretokenizers"] if pre["type"] == "Sequence" else [pre]
        return (
            self._state["normalizer"] is None
            and {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}.items() <= steps[-1].items()
            and all(step["type"] == "Digits" for step in steps[:-1])
            and not any(token["rstrip"] or re.search(r"\s", token["content"]) for token in self._state["added_tokens"])
        )

    @cached_property
    def _state(self) -> dict[str, Any]:
        return json.loads(self._backend.to_str())

    @cached_property
    def special_tokens(self) -> tuple[str, ...]:
        """Special tokens that a text may spell, by ascending id."""
        added = sorted(self._state["added_tokens"], key=itemgetter("id"))
        return tuple(token["content"] for token in added if token["special"])

    @property
    def chat_template(self) -> Any:
        """Jinja chat template, or several by name; None without one."""
        return self._hugging_face.chat_template

    @cached_property
    def opening_ids(self) -> tuple[int, ...]:
        """Special tokens that transformers puts before every text: the beginning-of-sequence token, or none."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        return tuple(
            id_ for id_, _ in takewhile(itemgetter(1), zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the ids of one text with the special tokens that transformers adds."""
        return self._backend.encode(text, add_special_tokens=True).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_batch_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of each text and the character span of each token, on all cores."""
        encodings = self._with_untrimmed_spans.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    @cached_property
    def _with_untrimmed_spans(self) -> tokenizers.Tokenizer:
        """The tokenizer without its post-processor, which may trim spaces from spans."""
        return type(self._backend).from_str(json.dumps(self._state | {"post_processor": None}))

    def piece(self, id_: int) -> str:
        """Return an entry as the vocabulary spells it; empty if the id has none."""
        return self._backend.id_to_token(id_) or ""

    def id_of(self, piece: str) -> int | None:
        """Return the id of an entry as the vocabulary spells it; None if there is none."""
        return self._backend.token_to_id(piece)

    def add_special_tokens(self, tokens: Sequence[str]) -> None:
        """Add special tokens after the last id. Properties that have been read keep their values; save and load it."""
        from tokenizers import AddedToken

        added: list[Any] = [AddedToken(token, normalized=False) for token in tokens]
        self._hugging_face.add_tokens(added, special_tokens=True)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens spelled out."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, special tokens spelled out, on all cores."""
        return self._backend.decode_batch(batch, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Save files that transformers' AutoTokenizer loads."""
        self._hugging_face.save_pretrained(folder)

    def apply_chat_template(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Return the text of a chat, with `add_generation_prompt` up to where the assistant's next turn begins.

        With no messages, this is the text before a chat that the assistant begins.

        Raises:
            ChatTemplateError: The template refuses the messages.
            DataError: The tokenizer has no chat template.
        """
        if self._hugging_face.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template; use a chat model's tokenizer, or prompt and completion keys."
            )
        try:
            # A batch of one: transformers rejects an unbatched empty chat, even if the template accepts it.
            (text,) = self._hugging_face.apply_chat_template(
                [messages], tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except _template_errors() as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ChatTemplateError(f'the tokenizer\'s chat template refuses the messages: "{reason}"') from error
        assert isinstance(text, str)
        return text


class SentencePieceTokenizer:
    """A sentencepiece model run by its own library, as transformers' conversion breaks merge ties differently."""

    splits_at_spaces = False  # it prepends a space to every text
    opening_ids: tuple[int, ...] = ()  # a bare model file adds no special tokens
    special_tokens: tuple[str, ...] = ()  # spelled in a text, they are ordinary text
    chat_template: None = None

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        data = path.read_bytes()
        if not data:
            raise DataError(f"{path} is empty; give a sentencepiece model.")
        try:
            self._processor = SentencePieceProcessor(model_proto=data)
        except (RuntimeError, UnicodeDecodeError) as error:
            if re.match(rb"[A-Za-z0-9+/]+=* \d+\r?\n", data):
                raise DataError(
                    f"{path} is a tiktoken file, like Llama 3's; give a folder with its tokenizer.json."
                ) from error
            raise DataError(
                f"{path} is not a complete sentencepiece model ({len(data):,} bytes); copy it again."
            ) from error
        self._path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        ids = {name: getattr(self._processor, f"{name}_id")() for name in SPECIAL_NAMES}
        self.special_ids = {name: id_ if id_ >= 0 else None for name, id_ in ids.items()}
        self.bos_id, self.eos_id = self.special_ids["bos"], self.special_ids["eos"]
        self.prefix_id = self.eos_id if self.bos_id is None else self.bos_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self._processor.encode(text)

    def encode_with_special_tokens(self, text: str) -> list[int]:
        """Return the ids of one text; no special tokens are added."""
        return self.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        return self._processor.encode(list(texts), num_threads=_num_threads())

    def encode_batch_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of each text and the character span of each token, on all cores."""
        encodings = self._processor.encode(list(texts), return_type="offset_mapping", num_threads=_num_threads())
        return [(encoding["ids"], encoding["offsets"]) for encoding in encodings]

    def piece(self, id_: int) -> str:
        """Return an entry as the vocabulary spells it."""
        return self._processor.id_to_piece(id_)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids.

        Raises:
            DataError: An id is outside the vocabulary, as a model with padded embeddings can generate.
        """
        for id_ in ids:
            if not 0 <= id_ < self.vocab_size:
                raise DataError(
                    f"token {id_} is not one of the {self.vocab_size:,} pieces of {self._path}; use the tokenizer that "
                    "the model was trained with."
                )
        return self._processor.decode(list(ids))

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, on all cores."""
        return self._processor.decode(list(map(list, batch)), num_threads=_num_threads())

    def save(self, folder: str | Path) -> None:
        """Save files that transformers' AutoTokenizer loads."""
        sentencepiece_folder.save(self._path, folder)

    def apply_chat_template(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Raise DataError: a sentencepiece model has no chat template."""
        raise DataError(f"{self._path} has no chat template; use a chat model's folder, or prompt and completion keys.")


AnyTokenizer = Tokenizer | SentencePieceTokenizer


def load_tokenizer(source: str | Path) -> AnyTokenizer:
    """Load a tokenizer, without running code that comes with it.

    Args:
        source: A hub name, a folder (possibly with only vocab.json and merges.txt, or tokenizer.model), a .gguf file,
            or a sentencepiece .model file.

    Raises:
        DataError: The tokenizer is missing, incomplete or damaged, or the hub cannot be reached.
    """
    path = Path(source)
    if path.suffix == ".model" and path.is_file():
        return _from_model(path)
    if path.suffix == ".gguf" and path.is_file():
        from megaft.base.gguf import read_header

        read_header(path)
        return Tokenizer(from_pretrained(path.parent, gguf_file=path.name))
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        raise DataError(
            f"{path} is not a tokenizer; give a folder, a .gguf file, a sentencepiece .model or a hub name."
        )
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(source)) or path.suffix in (".model", ".gguf"):
        raise DataError(f"there is no tokenizer at {source}; give an existing folder or file, or a hub name.")
    return _from_hub(str(source))


def _template_errors() -> tuple[type[Exception], ...]:
    """Return the exceptions that a template can raise: jinja's own, and Python's from its expressions."""
    from jinja2 import TemplateError

    python = (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError)
    return TemplateError, *python


def _num_threads() -> int:
    return int(os.environ.get("RAYON_NUM_THREADS", -1))


def _single_id(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _from_model(path: Path) -> SentencePieceTokenizer:
    tokenizer = SentencePieceTokenizer(path)
    if path.name == MODEL_NAME and not is_saved_model(path.parent) and (added := additions(path.parent)):
        raise DataError(
            f"{path} is not the complete tokenizer: {', '.join(added)} in its folder add to it; give the folder "
            f"{path.parent}, or, to use the model alone, copy it to another folder."
        )
    return tokenizer


def _from_hub(name: str) -> AnyTokenizer:
    """Load by hub name; a repository with tokenizer.model and no tokenizer.json is loaded as a folder is."""
    if find_file_if_any(name, "tokenizer.json") is None and (model := find_file_if_any(name, MODEL_NAME)) is not None:
        require_safe_files("the tokenizer", name)
        for beside in BESIDE:  # downloads them to the hub cache
            find_file_if_any(name, beside)
        return _from_folder(model.parent)
    return Tokenizer(from_pretrained(name))


def _from_folder(folder: Path) -> AnyTokenizer:
    has = {path.name for path in folder.iterdir() if path.is_file()}
    if "tokenizer.json" in has:
        _check_json(folder / "tokenizer.json")
        if is_saved_model(folder):
            return SentencePieceTokenizer(folder / MODEL_NAME)
    elif MODEL_NAME in has:
        tokenizer = SentencePieceTokenizer(folder / MODEL_NAME)
        return Tokenizer(sentencepiece_folder.load(folder)) if additions(folder) else tokenizer
    elif len(has & {"vocab.json", "merges.txt"}) == 1:
        (missing,) = {"vocab.json", "merges.txt"} - has
        raise DataError(f"{folder} has no {missing}; a BPE needs both vocab.json and merges.txt. Copy it there.")
    elif "vocab.json" not in has:
        raise DataError(
            f"{folder} has no tokenizer.json, tokenizer.model, or vocab.json with merges.txt; {_fix_for(has)}."
        )
    else:
        _check_json(folder / "vocab.json")
        if not has & {"config.json", "tokenizer_config.json"}:
            from transformers import GPT2Tokenizer

            with naming_errors(folder):
                loaded = GPT2Tokenizer.from_pretrained(folder)
            require_usable(folder, loaded)
            return Tokenizer(loaded)
    return Tokenizer(from_pretrained(folder))


def _fix_for(names: set[str]) -> str:
    """Return the fix for a folder without a supported tokenizer file."""
    other = sorted(name for name in names if name in UNSUPPORTED_FILES or name.endswith(".tiktoken"))
    return f"convert {', '.join(other)} to a tokenizer.json" if other else "give a tokenizer's folder"


def _check_json(path: Path) -> None:
    """Refuse a damaged vocab.json or tokenizer.json, and ids so large that `tokenizers` would use all memory."""
    content = read_json(path)
    model = content.get("model", content) if isinstance(content, dict) else None
    vocabulary = model.get("vocab", model) if isinstance(model, dict) else None
    for token, id_ in vocabulary.items() if isinstance(vocabulary, dict) else ():
        if isinstance(id_, int) and id_ > MAX_TOKEN_ID:
            raise DataError(
                f"{path} has token {token[:40]!a} with the id {id_}; ids must be at most {MAX_TOKEN_ID}. Copy it again."
            )
