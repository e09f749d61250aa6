"""Published model configurations by name, as transformers would load them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megaft.base.checks import require
from megaft.base.errors import DataError
from megaft.base.files import read_json
from megaft.base.untrusted import require_safe_files
from megaft.weights.folder import model_folder


def _gpt2(layers: int, width: int, heads: int, vocab_size: int = 50_257) -> dict[str, Any]:
    return {
        "model_type": "gpt2",
        "n_layer": layers,
        "n_embd": width,
        "n_head": heads,
        "vocab_size": vocab_size,
        "n_positions": 1024,
    }


def _llama(
    layers: int, width: int, inner: int, heads: int, groups: int, vocab_size: int, positions: int, tied: bool = False
) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": groups,
        "vocab_size": vocab_size,
        "max_position_embeddings": positions,
        "tie_word_embeddings": tied,
    }


PRESETS = {
    "gpt2": _gpt2(12, 768, 12),
    "gpt2-medium": _gpt2(24, 1024, 16),
    "gpt2-large": _gpt2(36, 1280, 20),
    "gpt2-xl": _gpt2(48, 1600, 25),
    # Shoeybi et al. 2019, table 2; GPT-2's vocabulary padded to 51,200 entries: a multiple of 8 ranks x 128.
    "megatron-355m": _gpt2(24, 1024, 16, 51_200),
    "megatron-2.5b": _gpt2(54, 1920, 20, 51_200),
    "megatron-8.3b": _gpt2(72, 3072, 24, 51_200),
    "llama-2-7b": _llama(32, 4096, 11_008, 32, 32, 32_000, 4096),
    "llama-2-13b": _llama(40, 5120, 13_824, 40, 40, 32_000, 4096),
    "llama-3.1-8b": _llama(32, 4096, 14_336, 32, 8, 128_256, 131_072),
    "llama-3.1-70b": _llama(80, 8192, 28_672, 64, 8, 128_256, 131_072),
    "llama-3.2-1b": _llama(16, 2048, 8192, 32, 8, 128_256, 131_072, tied=True),
    "llama-3.2-3b": _llama(28, 3072, 8192, 24, 8, 128_256, 131_072, tied=True),
    "smollm2-135m": _llama(30, 576, 1536, 9, 3, 49_152, 8192, tied=True),
    "smollm2-360m": _llama(32, 960, 2560, 15, 5, 49_152, 8192, tied=True),
    "smollm2-1.7b": _llama(24, 2048, 8192, 32, 32, 49_152, 8192, tied=True),
}


def configuration(model: str) -> dict[str, Any]:
    """Return a model's configuration.

    Args:
        model: A name in PRESETS, a config.json, a model folder, or a run folder.

    Raises:
        ConfigError: It is none of these.
        DataError: The file is not a JSON object, or has settings that would run code.
    """
    source = source_of(model)
    if source in PRESETS:
        return PRESETS[source]
    path = Path(source)
    of_run = "" if path.is_relative_to(model) else f", a run that trains {source}"
    require(
        path.is_file() and path.suffix != ".gguf",
        f"--model is {model}{of_run}; give a folder with a config.json, the folder of a run, or one of "
        f"{', '.join(PRESETS)}.",
    )
    settings = _settings(path)
    require_safe_files("--model", path)
    return settings


def source_of(model: str) -> str:
    """Return the source of a model's configuration: its name in PRESETS, or its file.

    For a run folder it is that of the export or, while there is none, of the model that the run trains.
    """
    file = _config_file(model)
    trained = _trained_model(file) if file.name == "config.json" and file.is_file() else None
    return str(file if trained is None else _config_file(trained))


def _config_file(model: str) -> Path:
    """Return the config.json of a folder; other names as they are."""
    if model in PRESETS or not Path(model).is_dir():
        return Path(model)
    return Path(model_folder(model, "--model")) / "config.json"


def _trained_model(path: Path) -> str | None:
    """Return the source of the model that a run trains, from the run's config.json; None for a model's config.json."""
    settings = _settings(path)
    model = settings.get("model")
    if "model_type" in settings or not isinstance(model, dict):
        return None
    source = model.get("path") or model.get("from_scratch")
    return source if isinstance(source, str) else None


def _settings(path: Path) -> dict[str, Any]:
    settings = read_json(path)
    if not isinstance(settings, dict):
        raise DataError(f"{path} is a JSON {type(settings).__name__}, not an object; copy it from the model again.")
    return settings
