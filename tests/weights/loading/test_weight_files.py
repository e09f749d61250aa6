"""Model folders whose weights and config.json disagree are refused however they are loaded."""

import logging
import shutil

import pytest
import torch
from families_models import tiny_config, tiny_model
from tiny_models import change_tensors, edit_json, logits_of, make_model

from megaft.base.errors import DataError
from megaft.weights.loading.pretrained import load_language_model
from megaft.weights.reading import open_weights

EMBEDDING = {"gpt2": "transformer.wte.weight", "llama": "model.embed_tokens.weight"}
UP = "model.layers.1.mlp.up_proj.weight"


def config_of(folder):
    return folder / "config.json"


def add_head(folder, name, change):
    change_tensors(folder, lambda tensors: tensors.update({"lm_head.weight": change(tensors[EMBEDDING[name]])}))


def store_as(dtype):
    return lambda folder: change_tensors(folder, lambda tensors: tensors.update({UP: tensors[UP].to(dtype)}))


def index_without_files(folder):
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00001-of-00002.safetensors"}}')
    (folder / "model.safetensors").rename(folder / "other.safetensors")


# name: a family, how its folder is changed, and what is said
REFUSED = {
    "a layer more than config.json counts": (
        "llama",
        lambda folder: edit_json(config_of(folder), num_hidden_layers=1),
        r"has no model\.layers\.1\.\S+ \(9 in all\)",
    ),
    "a value head": (
        "gpt2",
        lambda folder: change_tensors(folder, lambda tensors: tensors.update({"v_head.weight": torch.ones(1, 32)})),
        r"has no v_head\.weight \(1 in all\)",
    ),
    "tied in config.json, apart in the file": (
        "llama",
        lambda folder: edit_json(config_of(folder), tie_word_embeddings=True),
        r"ties lm_head\.weight to model\.embed_tokens\.weight, but .*tie_word_embeddings",
    ),
    "tied by default, one number apart in the file": (
        "gpt2",
        lambda folder: add_head(folder, "gpt2", lambda embedding: embedding.clone().index_fill(0, torch.tensor(7), 0)),
        r"ties lm_head\.weight to transformer\.wte\.weight, but .*tie_word_embeddings",
    ),
    "untied in config.json, no output layer in the file": (
        "gpt2",
        lambda folder: edit_json(config_of(folder), tie_word_embeddings=False),
        r"lm_head\.weight is missing \(1 in all\)",
    ),
    "an output layer that was resized alone": (
        "llama",
        lambda folder: add_head(folder, "llama", lambda embedding: torch.cat([embedding, embedding[:3]])),
        r"lm_head\.weight is \[64, 32\], not \[61, 32\]",
    ),
    "int8": ("llama", store_as(torch.int8), rf"stores 1 quantized tensor, such as {UP} as I8;"),
    "fp8": ("llama", store_as(torch.float8_e4m3fn), rf"stores 1 quantized tensor, such as {UP} as F8_E4M3;"),
    "quantized by its config.json": (
        "llama",
        lambda folder: edit_json(config_of(folder), quantization_config={"quant_method": "fp8"}),
        "quantization_config",
    ),
    "padding beyond the vocabulary": (
        "llama",
        lambda folder: edit_json(config_of(folder), pad_token_id=61),
        r"pad_token_id is 61; .* null or less than vocab_size \(61\)",
    ),
    "an index of files that are not there": ("llama", index_without_files, r"model-00001-of-00002\.safetensors"),
}


def both_names(folder):
    add_head(folder, "gpt2", torch.clone)


def old_buffers(folder):
    buffers = {"h.0.attn.bias": torch.ones(1, 1, 64, 64).tril().to(torch.uint8), "h.0.attn.masked_bias": torch.ones(())}
    change_tensors(
        folder, lambda tensors: tensors.update({f"transformer.{name}": tensor for name, tensor in buffers.items()})
    )


def without_prefix(folder):
    def rename(tensors):
        for name in [*tensors]:
            tensors[name.removeprefix("transformer.")] = tensors.pop(name)

    change_tensors(folder, rename)


def padding_beyond_the_vocabulary(folder):
    edit_json(config_of(folder), pad_token_id=10**6)


def old_frequencies(folder):
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    change_tensors(folder, lambda tensors: tensors.update({name: torch.ones(4)}))


ACCEPTED = {
    "the same weight under both names": ("gpt2", both_names),
    "masks that old files have": ("gpt2", old_buffers),
    "names of the model without its output layer": ("gpt2", without_prefix),
    "frequencies that old files have": ("llama", old_frequencies),
    "padding beyond the vocabulary, in a family without a padding row": ("gpt2", padding_beyond_the_vocabulary),
}


def make_folder(folder, name, change):
    make_model(name).save_pretrained(folder)
    change(folder)
    return folder


@pytest.mark.parametrize("load", [load_language_model, open_weights])
@pytest.mark.parametrize("case", REFUSED)
def test_a_folder_that_contradicts_itself_is_refused(case, load, tmp_path):
    name, change, said = REFUSED[case]
    folder = make_folder(tmp_path / "model", name, change)
    with pytest.raises(DataError, match=said) as error:
        load(str(folder))
    assert str(folder) in str(error.value)
    assert "\n" not in str(error.value)


@pytest.fixture
def logged():
    """Messages that transformers logs."""
    messages, logger = [], logging.getLogger("transformers")
    handler = logging.Handler()
    handler.emit = lambda record: messages.append(record.getMessage())
    logger.addHandler(handler)
    yield messages
    logger.removeHandler(handler)


@pytest.mark.parametrize(
    "name",
    ["a value head", "an output layer that was resized alone", "untied in config.json, no output layer in the file"],
)
def test_transformers_prints_no_report_beside_a_refusal(name, logged, tmp_path):
    family, change, said = REFUSED[name]
    with pytest.raises(DataError, match=said):
        load_language_model(str(make_folder(tmp_path / "model", family, change)))
    assert not [message for message in logged if "REPORT" in message]


def test_experts_that_do_not_stack_are_named(logged, tmp_path):
    def cut(tensors):
        name = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
        tensors[name] = tensors[name][:5].clone()

    tiny_model(tiny_config("mixtral")).save_pretrained(tmp_path)
    change_tensors(tmp_path, cut)
    said = r"layers\.0\.mlp\.experts\.gate_up_proj cannot be converted from the stored weights: .*equal size.*\[5, 32\]"
    with pytest.raises(DataError, match=said):
        load_language_model(str(tmp_path))
    assert not [message for message in logged if "REPORT" in message]


@pytest.mark.parametrize("case", ACCEPTED)
def test_what_older_versions_stored_besides_is_left_out(case, tmp_path):
    name, change = ACCEPTED[case]
    folder = str(make_folder(tmp_path / "model", name, change))
    tokens = torch.arange(20)[None]
    assert torch.equal(logits_of(load_language_model(folder), tokens), logits_of(make_model(name), tokens))
    read = open_weights(folder).read
    assert all(torch.equal(read(each), weight) for each, weight in make_model(name).named_parameters())


def test_layers_that_transformers_leaves_out_on_purpose_are_no_error(tmp_path):
    """GLM-4's files contain its multi-token prediction layer, which transformers is configured to ignore."""
    from transformers import AutoModelForCausalLM
    from transformers.models.glm4_moe.modeling_glm4_moe import Glm4MoePreTrainedModel

    assert any("layers" in pattern for pattern in Glm4MoePreTrainedModel._keys_to_ignore_on_load_unexpected)
    shape = {"hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "n_routed_experts": 4, "n_group": 1}
    from transformers import AutoConfig

    config = AutoConfig.for_model("glm4_moe", vocab_size=61, pad_token_id=0, num_experts_per_tok=2, **shape, **heads)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path)
    extra = {"model.layers.92.eh_proj.weight": torch.ones(2, 2)}
    change_tensors(tmp_path, lambda tensors: tensors.update(extra))
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(logits_of(load_language_model(str(tmp_path)), tokens), logits_of(model, tokens))


def test_a_folder_with_two_sets_of_weights_is_refused(tmp_path):
    """transformers reads model.safetensors; other programs read the index."""
    folder = make_folder(tmp_path / "model", "llama", lambda _: None)
    make_model("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert load_language_model(str(tmp_path / "sharded"))
    shutil.copytree(tmp_path / "sharded", folder, dirs_exist_ok=True)
    with pytest.raises(DataError, match=r"model\.safetensors and model\.safetensors\.index\.json"):
        load_language_model(str(folder))
