"""`megaft generate`: continue texts and answer chats with a model. Imports no torch until there is something to do."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from megaft.backend import Backend, backend_of
from megaft.config import require
from megaft.errors import DataError
from megaft.plural import counted
from megaft.ranges import NOT_NEGATIVE, SEED, Range, at_least, require_ranges
from megaft.unicode_text import is_unicode

if TYPE_CHECKING:
    from megaft.parallel import Topology
    from megaft.prompts import Prompt
    from megaft.sampling import Reader
    from megaft.tokenizer import AnyTokenizer


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """Sampling of the next token."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens whose probabilities sum to this; 1 draws from all."""
    repetition_penalty: float = 1.0
    """Makes tokens seen before less likely where above 1; 1 does nothing."""

    def __post_init__(self) -> None:
        require_ranges(
            self,
            temperature=NOT_NEGATIVE.such_as("0.8"),
            top_k=at_least(0).such_as("50"),
            top_p=Range("more than 0 and at most 1, for example 0.95", lambda value: 0 < value <= 1),
            repetition_penalty=Range("0.001 to 1000, for example 1.2", lambda value: 0.001 <= value <= 1000),
        )
        require(
            self.temperature > 0 or (self.top_k == 0 and self.top_p == 1),
            f"--top-k is {self.top_k} and --top-p is {self.top_p}, which have no effect at --temperature 0; drop them.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Continue each text, or answer each chat, with a model."""

    model: str
    """A run's folder, a model folder, a hub name or a GGUF file."""
    prompt: tuple[str, ...] = ()
    """One text to continue, or several. Each is continued by itself, from the same seed. The special tokens that the
    tokenizer puts before a text (the beginning-of-sequence token) are put before it, unless it spells them itself."""
    chat: tuple[str, ...] = ()
    """In place of prompts: a user's message to answer, or several, each a chat of its own. The tokenizer's chat
    template renders it, and alone decides how it begins."""
    messages: tuple[str, ...] = ()
    """In place of prompts: a chat to answer, or several, each a JSON list of objects with a role and a content."""
    max_new_tokens: int = 100
    """Tokens after the prompt, unless the model ends the text before. Beyond its context it forgets the oldest."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    seed: int = 0
    """Seed of every draw."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Dtype of the model's computation."""
    backend: Backend | None = None
    """Model implementation. By default transformers, or megatron-core for a folder in megatron's format."""
    tensor_parallel_size: int = 1
    """Ranks that share each matrix, with megatron-core's modules: all that `torchrun -m megaft generate` starts."""
    ignore_eos: bool = False
    """Go on at end tokens: those of generation_config.json (else config.json), and the tokenizer's."""
    json: bool = False
    """Print one JSON object a prompt instead of the text."""

    def __post_init__(self) -> None:
        given = {name: texts for name in ("prompt", "chat", "messages") if (texts := getattr(self, name))}
        require(len(given) > 0, "--prompt is empty; give a text to continue, or a chat to answer (--chat, --messages).")
        require(len(given) == 1, f"{' and '.join(f'--{name}' for name in given)} are given; use one of them.")
        for name, text in ((name, text) for name, texts in given.items() for text in texts):
            require(is_unicode(text), f"--{name} is {text!r}, which has bytes that are not UTF-8; give UTF-8 text.")
        require_ranges(self, max_new_tokens=at_least(1).such_as("100"), seed=SEED)
        require_ranges(self, tensor_parallel_size=at_least(1).such_as("8"))


def main(config: GenerateConfig) -> int:
    """Print each prompt with its continuation, or a JSON object a line.

    Raises:
        ConfigError: There is no such way to run the model.
        DataError: The model cannot be loaded, or a prompt has no tokens.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")  # libraries' bars over the files of a model
    from megaft import parallel

    source = model_source(config.model)
    if backend_of(source, config.backend, config.tensor_parallel_size) == "hugging-face":
        return generate(config, source, load_cached_model)
    return parallel.exit_code_on_ranks(lambda topology: generate(config, source, partial(_load_part, config, topology)))


def generate(config: GenerateConfig, source: str, load: Callable[[str, Any], Any]) -> int:
    """Continue every prompt; the main rank prints.

    Args:
        config: What to do.
        source: Where the model's files are.
        load: Returns the model as sampling.Reader; called with `source` and torch's dtype when the prompts are sound.
    """
    import torch

    from megaft import parallel
    from megaft.end_tokens import end_ids
    from megaft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    prompts = _prompts(config, tokenizer)
    model = load(source, getattr(torch, config.dtype))
    for prompt in prompts:
        _require_fits(model, prompt)
    ends = frozenset() if config.ignore_eos else end_ids(source, tokenizer, model.vocab_size)
    for prompt in prompts:
        row = prompt.source | continue_prompt(model, tokenizer, prompt, ends, config)
        if parallel.is_main():
            print_text(json.dumps(row) if config.json else prompt.shown + row["text"])
    return 0


def _prompts(config: GenerateConfig, tokenizer: AnyTokenizer) -> list[Prompt]:
    from megaft.prompts import chat_prompt, parse_messages, text_prompt

    chats = [[{"role": "user", "content": text}] for text in config.chat] + list(map(parse_messages, config.messages))
    return [
        *(text_prompt(tokenizer, text) for text in config.prompt),
        *(chat_prompt(tokenizer, chat) for chat in chats),
    ]


def _require_fits(model: Reader, prompt: Prompt) -> None:
    """Raise DataError for a token that the model does not embed; warn of a prompt beyond its positions."""
    from megaft import parallel

    ids = prompt.ids
    if max(ids) >= model.vocab_size:
        raise DataError(
            f"{prompt.name} has token {max(ids)}, but the model embeds {model.vocab_size} tokens; "
            "use the tokenizer the model was made with."
        )
    limit = model.max_positions
    if limit is not None and len(ids) > limit and parallel.is_main():
        print(
            f"warning: the prompt has {counted(len(ids), 'token')}, of which the model reads the last {limit}.",
            file=sys.stderr,
        )


def print_text(text: str) -> None:
    """Print in the output's encoding, with the characters that it lacks escaped."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def load_cached_model(source: str, dtype: Any) -> Any:
    """Return a transformers model to generate with, where this machine computes fastest."""
    import torch

    from megaft.models.generation import CachedModel, exact_cache
    from megaft.models.hugging_face import load_language_model
    from megaft.models.trials import on_trial, require_causal

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    language_model = load_language_model(source, dtype, setting="--model").eval()
    with on_trial(language_model) as tried:
        require_causal(language_model, tried)  # before it takes memory of the GPU
    cache_name = exact_cache(language_model.to(device), tried)
    if cache_name is None:
        print(
            f"warning: {source} has no exact cache of what it read; each token takes a pass over the whole text.",
            file=sys.stderr,
        )
    return CachedModel(language_model, cache_name)


def _load_part(config: GenerateConfig, topology: Topology, source: str, dtype: Any) -> Any:
    from megaft import parallel

    size = config.tensor_parallel_size
    require(
        topology.world_size == size,
        f"--tensor-parallel-size is {size}, but this runs on {counted(topology.world_size, 'rank')}; "
        f"start as many as it says, such as with torchrun --nproc-per-node {size} -m megaft generate.",
    )
    device = parallel.join(topology)
    parallel.cut_matrices(size)
    from megaft.models.megatron_generation import load_cached_part

    return load_cached_part(source, dtype, device)


def model_source(model: str) -> str:
    """Return the folder of the model's files; for a run's folder, its export/.

    Raises:
        DataError: The folder holds no model.
    """
    folder = Path(model)
    if (folder / "export").is_dir():
        return str(folder / "export")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            f"--model is {model}, a folder with neither config.json nor export/; "
            "give a model's folder, or a run's after it has ended."
        )
    return model


def continue_prompt(
    model: Reader, tokenizer: AnyTokenizer, prompt: Prompt, end_ids: frozenset[int], config: GenerateConfig
) -> dict[str, Any]:
    """Return the continuation's text, tokens and speed. Its seconds include the reading of the prompt."""
    from megaft.sampling import continue_tokens

    begin = time.perf_counter()
    tokens = list(
        continue_tokens(
            model,
            prompt.ids,
            max_new_tokens=config.max_new_tokens,
            settings=config.sampling,
            seed=config.seed,
            end_ids=end_ids,
            num_opening=prompt.num_opening,
        )
    )
    seconds = time.perf_counter() - begin
    is_ended = tokens[-1] in end_ids
    return {
        "text": _text_after(tokenizer, prompt.ids[prompt.num_opening :], tokens[:-1] if is_ended else tokens),
        "prompt_tokens": prompt.ids,
        "tokens": tokens,
        "is_ended_by_model": is_ended,
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
        "seed": config.seed,
        "dtype": config.dtype,
    }


def _text_after(tokenizer: AnyTokenizer, prompt_ids: list[int], tokens: list[int]) -> str:
    """Decode behind the prompt: sentencepiece drops the space before a text's first word.

    A model may have more rows than the tokenizer has tokens, to fill up its matrices; those have no text.
    """
    whole = [id_ for id_ in prompt_ids + tokens if id_ < tokenizer.vocab_size]
    return tokenizer.decode(whole)[len(tokenizer.decode(prompt_ids)) :]
