"""`megaft generate`: continue texts and answer chats with a model. torch is imported after the flags are parsed."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from megaft.base.checks import require
from megaft.base.errors import DataError
from megaft.base.plural import counted
from megaft.commands.generate.config import GenerateConfig
from megaft.models.backend import backend_of
from megaft.weights.folder import model_source

if TYPE_CHECKING:
    from megaft.base.parallel import Topology
    from megaft.commands.generate.prompts import Prompt
    from megaft.commands.generate.sampling import Decoder
    from megaft.data.tokenizer import AnyTokenizer


def main(config: GenerateConfig) -> int:
    """Print each prompt with its continuation, or one JSON object per line.

    Raises:
        ConfigError: The model cannot run with these settings.
        DataError: The model cannot be loaded, or a prompt has no tokens.
    """
    from megaft.base import parallel

    source = model_source(config.model)
    if backend_of(source, config.backend, config.tensor_parallel_size) == "hugging-face":
        return generate(config, source, load_cached_model)
    return parallel.exit_code_on_ranks(
        lambda topology: generate(config, source, partial(_load_shard, config, topology))
    )


def generate(config: GenerateConfig, source: str, load: Callable[[str, Any], Any]) -> int:
    """Continue every prompt; the main rank prints.

    Args:
        config: The settings.
        source: Folder, file or hub name of the model.
        load: Returns the model as a sampling.Decoder; called with `source` and the dtype once the prompts are valid.
    """
    import torch

    from megaft.base import parallel
    from megaft.data.end_tokens import end_ids
    from megaft.data.tokenizer import load_tokenizer

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
    from megaft.commands.generate.prompts import chat_prompt, parse_messages, text_prompt

    chats = [[{"role": "user", "content": text}] for text in config.chat] + list(map(parse_messages, config.messages))
    return [
        *(text_prompt(tokenizer, text) for text in config.prompt),
        *(chat_prompt(tokenizer, chat) for chat in chats),
    ]


def _require_fits(model: Decoder, prompt: Prompt) -> None:
    """Raise DataError for a token that the model does not embed; warn of a prompt longer than its context."""
    from megaft.base import parallel

    ids = prompt.ids
    if max(ids) >= model.vocab_size:
        raise DataError(
            f"{prompt.name} has token {max(ids)}, but the model embeds {model.vocab_size} tokens; "
            "use the tokenizer that the model was trained with."
        )
    limit = model.max_positions
    if limit is not None and len(ids) > limit and parallel.is_main():
        print(
            f"warning: the prompt has {counted(len(ids), 'token')}; the model reads only the last {limit}.",
            file=sys.stderr,
        )


def print_text(text: str) -> None:
    """Print in the output's encoding, escaping characters that it cannot represent."""
    encoding = sys.stdout.encoding or "utf-8"
    print(text.encode(encoding, "backslashreplace").decode(encoding), flush=True)


def load_cached_model(source: str, dtype: Any) -> Any:
    """Return a transformers model for generation, on the GPU if there is one."""
    import torch

    from megaft.models.generation import CachedModel, exact_cache
    from megaft.models.half_linear import multiply_in_fp32
    from megaft.models.trials import require_causal, trial_model_of
    from megaft.weights.loading.pretrained import load_language_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    language_model = load_language_model(source, dtype, setting="--model").eval()
    with trial_model_of(language_model) as trial_model:
        require_causal(language_model, trial_model)  # before it takes memory of the GPU
    multiply_in_fp32(language_model)
    cache_name = exact_cache(language_model.to(device), trial_model)
    if cache_name is None:
        print(
            f"warning: {source} has no usable KV cache (its cached logits differ from a full pass); each new token "
            "recomputes the whole text.",
            file=sys.stderr,
        )
    return CachedModel(language_model, cache_name)


def _load_shard(config: GenerateConfig, topology: Topology, source: str, dtype: Any) -> Any:
    from megaft.base import parallel

    size = config.tensor_parallel_size
    require(
        topology.world_size == size,
        f"--tensor-parallel-size is {size}, but this runs on {counted(topology.world_size, 'rank')}; "
        f"start {size} ranks: torchrun --nproc-per-node {size} -m megaft generate ...",
    )
    device = parallel.join(topology)
    parallel.start_tensor_parallelism(size)
    from megaft.models.megatron_generation import load_cached_shard

    return load_cached_shard(source, dtype, device)


def continue_prompt(
    model: Decoder, tokenizer: AnyTokenizer, prompt: Prompt, end_ids: frozenset[int], config: GenerateConfig
) -> dict[str, Any]:
    """Return the continuation's text, tokens and speed; its seconds include processing the prompt."""
    from megaft.commands.generate.sampling import continue_tokens

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
    """Decode tokens together with the prompt, because sentencepiece drops the space before a text's first word.

    Ids beyond the tokenizer's vocabulary are padding rows of the model, and have no text.
    """
    ids = [token_id for token_id in prompt_ids + tokens if token_id < tokenizer.vocab_size]
    return tokenizer.decode(ids)[len(tokenizer.decode(prompt_ids)) :]
