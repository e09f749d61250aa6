"""Tokenizers: text <-> ids, without special tokens unless the text spells them, and a hash of what they do."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Sequence
from functools import cached_property
from itertools import takewhile
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megaft.errors import DataError
from megaft.foreign import require_inert

if TYPE_CHECKING:
    import tokenizers
    from transformers import PreTrainedTokenizerFast

Messages = list[dict[str, Any]]
Span = tuple[int, int]
"""Where a token begins and ends in a text, in characters. One that stands for no character has none."""


class Tokenizer:
    """A tokenizer of the `tokenizers` library, with the special tokens and chat template transformers knows."""

    def __init__(self, hugging_face: PreTrainedTokenizerFast) -> None:
        self._hugging_face = hugging_face
        # Below transformers nothing is added and nobody warns of sequences longer than a model.
        self._backend: tokenizers.Tokenizer = hugging_face.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self.bos_id = _one_id(hugging_face.bos_token_id)
        self.eos_id = _one_id(hugging_face.eos_token_id)

    @property
    def prefix_id(self) -> int | None:
        """What scoring puts before a document: the beginning-of-sequence token, else the end-of-sequence one."""
        return self.eos_id if self.bos_id is None else self.bos_id

    @cached_property
    def vocab_size(self) -> int:
        """The largest id plus one, added tokens included."""
        return 1 + max(self._backend.get_vocab(with_added_tokens=True).values())

    @cached_property
    def sha256(self) -> str:
        """A hash of everything that decides ids, so it is the same wherever the tokenizer was loaded from."""
        deciding = {key: self._state[key] for key in ("model", "added_tokens", "normalizer", "pre_tokenizer")}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    @cached_property
    def cuts_at_spaces(self) -> bool:
        """Whether encoding a text in parts, cut before any space or newline that follows a non-space, is exact.

        GPT-2's pre-tokenizer has no alternative in which white space follows something else, so a match always ends
        there, and the lookahead in `\\s+(?!\\S)` begins at a white space. Unknown for other pre-tokenizers, for
        normalizers, and for added tokens that swallow the white space after them.
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
    def opening_ids(self) -> tuple[int, ...]:
        """Special tokens that transformers puts before every text: the beginning-of-sequence token, or none."""
        encoding = self._backend.encode("a", add_special_tokens=True)
        return tuple(
            id_ for id_, _ in takewhile(itemgetter(1), zip(encoding.ids, encoding.special_tokens_mask, strict=True))
        )

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self._backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        return [encoding.ids for encoding in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def encode_batch_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of each text and the characters that each token stands for, on all cores."""
        encodings = self._with_whole_spans.encode_batch(texts, add_special_tokens=False)
        return [(encoding.ids, encoding.offsets) for encoding in encodings]

    @cached_property
    def _with_whole_spans(self) -> tokenizers.Tokenizer:
        """The tokenizer without its post-processor, which may trim the spaces off spans."""
        return type(self._backend).from_str(json.dumps(self._state | {"post_processor": None}))

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids, special tokens spelled out."""
        return self._backend.decode(ids, skip_special_tokens=False)

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, special tokens spelled out, on all cores."""
        return self._backend.decode_batch(batch, skip_special_tokens=False)

    def save(self, folder: str | Path) -> None:
        """Write what transformers' AutoTokenizer loads."""
        self._hugging_face.save_pretrained(folder)

    def apply_chat_template(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Return the text of a conversation, up to where the assistant would speak with `add_generation_prompt`.

        Raises:
            DataError: The tokenizer has no chat template, or the template refuses the messages.
        """
        from jinja2 import TemplateError

        if self._hugging_face.chat_template is None:
            raise DataError(
                "the tokenizer has no chat template; use one of a chat model, or prompt and completion keys."
            )
        try:
            text = self._hugging_face.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt
            )
        except TemplateError as error:
            raise DataError(f"the tokenizer's chat template refuses the messages: {error}.") from error
        assert isinstance(text, str)
        return text


class SentencePieceTokenizer:
    """A sentencepiece model run by its own library: transformers' conversion breaks ties between merges differently."""

    cuts_at_spaces = False  # it puts a space before every text it is given
    opening_ids: tuple[int, ...] = ()  # a bare model file adds no special tokens

    def __init__(self, path: Path) -> None:
        from sentencepiece import SentencePieceProcessor

        data = path.read_bytes()
        if not data:
            raise DataError(f"{path} is empty; give a sentencepiece model.")
        try:
            self._processor = SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise DataError(
                f"{path} is not a whole sentencepiece model ({len(data):,} bytes); copy it anew."
            ) from error
        self._path = path
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.vocab_size: int = self._processor.vocab_size()
        bos, eos = self._processor.bos_id(), self._processor.eos_id()
        self.bos_id: int | None = bos if bos >= 0 else None
        self.eos_id: int | None = eos if eos >= 0 else None
        self.prefix_id = self.eos_id if self.bos_id is None else self.bos_id

    def encode(self, text: str) -> list[int]:
        """Return the ids of one text."""
        return self._processor.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        return self._processor.encode(list(texts), num_threads=_num_threads())

    def encode_batch_with_spans(self, texts: Sequence[str]) -> list[tuple[list[int], list[Span]]]:
        """Return the ids of each text and the characters that each token stands for, on all cores."""
        found = self._processor.encode(list(texts), return_type="offset_mapping", num_threads=_num_threads())
        return [(encoding["ids"], encoding["offsets"]) for encoding in found]

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of the ids."""
        return self._processor.decode(list(ids))

    def decode_batch(self, batch: Sequence[Sequence[int]]) -> list[str]:
        """Return the text of each list of ids, on all cores."""
        return self._processor.decode(list(map(list, batch)), num_threads=_num_threads())

    def save(self, folder: str | Path) -> None:
        """Write what transformers' AutoTokenizer loads."""
        Path(folder).mkdir(parents=True, exist_ok=True)
        shutil.copyfile(self._path, Path(folder, "tokenizer.model"))
        names = {"bos_token": self.bos_id, "eos_token": self.eos_id, "unk_token": self._processor.unk_id()}
        special = {name: self._processor.id_to_piece(index) for name, index in names.items() if index is not None}
        Path(folder, "tokenizer_config.json").write_text(json.dumps(special, indent=2) + "\n")

    def apply_chat_template(self, messages: Messages, *, add_generation_prompt: bool = False) -> str:
        """Raise DataError: a sentencepiece model has no chat template."""
        raise DataError(f"{self._path} has no chat template; use a chat model's folder, or prompt and completion keys.")


AnyTokenizer = Tokenizer | SentencePieceTokenizer


def load_tokenizer(source: str | Path) -> AnyTokenizer:
    """Load a tokenizer. No code that comes with it is run.

    Args:
        source: A hub name, a folder (also one with just vocab.json and merges.txt, or tokenizer.model), a .gguf file,
            or a sentencepiece .model file.

    Raises:
        DataError: It is missing, incomplete or damaged, or the hub cannot be reached.
    """
    path = Path(source)
    if path.suffix == ".model" and path.is_file():
        return SentencePieceTokenizer(path)
    if path.suffix == ".gguf" and path.is_file():
        return _from_transformers(str(path.parent), gguf_file=path.name)
    if path.is_dir():
        return _from_folder(path)
    if path.exists():
        raise DataError(f"{path} is no tokenizer; give a folder, a .gguf file, a sentencepiece .model or a hub name.")
    if not re.fullmatch(r"\w[\w.-]*(/[\w.-]+)?", str(source)) or path.suffix in (".model", ".gguf"):
        raise DataError(f"there is no tokenizer at {source}; give an existing folder or file, or a hub name.")
    return _from_transformers(str(source))


def _num_threads() -> int:
    return int(os.environ.get("RAYON_NUM_THREADS", -1))


def _one_id(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _from_folder(folder: Path) -> AnyTokenizer:
    has = {
        name: (folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model", "vocab.json", "merges.txt")
    }
    if has["tokenizer.json"]:
        _check_json(folder / "tokenizer.json")
    elif has["tokenizer.model"]:
        return SentencePieceTokenizer(folder / "tokenizer.model")
    elif has["vocab.json"] != has["merges.txt"]:
        missing = "merges.txt" if has["vocab.json"] else "vocab.json"
        raise DataError(f"{folder} has no {missing}; a BPE needs both vocab.json and merges.txt.")
    elif not has["vocab.json"]:
        raise DataError(f"{folder} has no tokenizer.json, tokenizer.model, or vocab.json with merges.txt.")
    else:
        _check_json(folder / "vocab.json")
        if not (folder / "config.json").is_file() and not (folder / "tokenizer_config.json").is_file():
            from transformers import GPT2Tokenizer

            return Tokenizer(GPT2Tokenizer.from_pretrained(folder))
    return _from_transformers(str(folder))


def _check_json(path: Path) -> None:
    try:
        json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DataError(f"{path} is damaged ({error}); copy it anew.") from error


def _from_transformers(source: str, **options: str) -> Tokenizer:
    from transformers import AutoTokenizer

    require_inert("tokenizer", source)
    try:
        hugging_face = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, struct.error) as error:  # the last two from damaged files
        reason = f"{type(error).__name__} {error}".strip().splitlines()[0]
        where = "" if Path(source).exists() else " There is no such folder here, so it was taken for a hub name."
        raise DataError(
            f"no tokenizer could be loaded from {source} ({reason}).{where} Give a folder with a tokenizer, or a hub "
            "name where there is a network."
        ) from error
    if not hugging_face.is_fast:
        raise DataError(f"{source} has no fast tokenizer (tokenizer.json); give its sentencepiece .model file instead.")
    return Tokenizer(hugging_face)
