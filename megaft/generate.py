"""`megaft generate`: continue texts with a model. Imports no torch until there is something to do."""

from __future__ import annotations

import json
import os
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
from megaft.ranges import ABOVE_0, NOT_NEGATIVE, SEED, Range, at_least, require_ranges

if TYPE_CHECKING:
    from megaft.parallel import Topology


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How the next token is chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 always takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens only; 0 draws from all."""
    top_p: float = 1.0
    """Draw from the fewest tokens that hold this much probability; 1 draws from all."""
    repetition_penalty: float = 1.0
    """Makes tokens seen before less likely where above 1; 1 does nothing."""

    def __post_init__(self) -> None:
        require_ranges(
            self,
            temperature=NOT_NEGATIVE.such_as("0.8"),
            top_k=at_least(0).such_as("50"),
            top_p=Range("more than 0 and at most 1, for example 0.95", lambda value: 0 < value <= 1),
            repetition_penalty=ABOVE_0.such_as("1.2"),
        )
        require(
            self.temperature > 0 or (self.top_k == 0 and self.top_p == 1),
            f"top-k is {self.top_k} and top-p is {self.top_p}, which have no effect at temperature 0; drop them.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """Continue each prompt with a model."""

    model: str
    """A run's folder, a model folder, a hub name or a GGUF file."""
    prompt: tuple[str, ...]
    """One text to continue, or several. Each is continued by itself, from the same seed."""
    max_new_tokens: int = 100
    """Tokens after the prompt, unless the model ends the text before. Beyond its context it forgets the oldest."""
    sampling: Annotated[SamplingConfig, tyro.conf.arg(name="")] = field(default_factory=SamplingConfig)
    seed: int = 0
    """Fixes every draw."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """What the model computes in."""
    backend: Backend | None = None
    """Whose modules run the model. By default transformers', megatron-core's for a folder in megatron's format."""
    tensor_parallel_size: int = 1
    """Ranks that share each matrix, with megatron-core's modules: all that `torchrun -m megaft generate` starts."""
    ignore_eos: bool = False
    """Go on where the model ends the text."""
    json: bool = False
    """Print one JSON object a prompt instead of the text."""

    def __post_init__(self) -> None:
        require(len(self.prompt) > 0, "prompt is empty; give a text to continue.")
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
    from megaft.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(source)
    prompts = [tokenizer.encode(prompt) for prompt in config.prompt]
    if not all(prompts):
        raise DataError(f"prompt {config.prompt[prompts.index([])]!r} has no tokens; give a text to continue.")
    model = load(source, getattr(torch, config.dtype))
    for prompt, ids in zip(config.prompt, prompts, strict=True):
        row = {"prompt": prompt, **continue_prompt(model, tokenizer, ids, config)}
        if parallel.is_main():
            print(json.dumps(row) if config.json else prompt + row["text"], flush=True)
    return 0


def load_cached_model(source: str, dtype: Any) -> Any:
    """Return a transformers model to generate with, where this machine computes fastest."""
    import torch

    from megaft.models.hugging_face import load_language_model
    from megaft.sampling import CachedModel

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return CachedModel(load_language_model(source, dtype).eval().to(device))


def _load_part(config: GenerateConfig, topology: Topology, source: str, dtype: Any) -> Any:
    from megaft import parallel

    size = config.tensor_parallel_size
    require(
        topology.world_size == size,
        f"tensor-parallel-size is {size}, but there are {topology.world_size} ranks; start as many as it says, "
        f"such as with torchrun --nproc-per-node {size} -m megaft generate.",
    )
    device = parallel.join(topology)
    parallel.cut_matrices(size)
    from megaft.models.megatron_generation import load_cached_part

    return load_cached_part(source, dtype, device)


def model_source(model: str) -> str:
    """Return where the model's files are: a run's folder keeps them in export/.

    Raises:
        DataError: The folder holds no model.
    """
    folder = Path(model)
    if (folder / "export").is_dir():
        return str(folder / "export")
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise DataError(
            f"model is {model}, a folder with neither config.json nor export/; "
            "give a model's folder, or a run's after it has ended."
        )
    return model


def continue_prompt(model: Any, tokenizer: Any, prompt_ids: list[int], config: GenerateConfig) -> dict[str, Any]:
    """Return the continuation's text, tokens and speed. Its seconds include the reading of the prompt."""
    from megaft.sampling import continue_tokens

    begin = time.perf_counter()
    tokens = list(
        continue_tokens(
            model,
            prompt_ids,
            max_new_tokens=config.max_new_tokens,
            settings=config.sampling,
            seed=config.seed,
            eos_id=None if config.ignore_eos else tokenizer.eos_id,
        )
    )
    seconds = time.perf_counter() - begin
    is_ended = not config.ignore_eos and tokens[-1] == tokenizer.eos_id
    text_ids = prompt_ids + (tokens[:-1] if is_ended else tokens)
    return {
        # Decoded behind the prompt: sentencepiece drops the space before a text's first word.
        "text": tokenizer.decode(text_ids)[len(tokenizer.decode(prompt_ids)) :],
        "tokens": tokens,
        "is_ended_by_model": is_ended,
        "seconds": seconds,
        "tokens_per_second": len(tokens) / seconds,
        "seed": config.seed,
        "dtype": config.dtype,
    }
