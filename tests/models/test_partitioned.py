"""Models built partitioned by ZeRO-3 equal models built unpartitioned."""

import math
import os
import re
import shutil
from dataclasses import replace

import pytest
import torch
from families_models import tiny_config, tiny_model
from tiny_models import MODELS, change_tensors, edit_json, make_model

from megaft.base.errors import ConfigError, DataError
from megaft.config.train import LoraConfig, ModelConfig
from megaft.models import hugging_face, trials
from megaft.weights.loading.causal_lm import vocab_size
from megaft.weights.loading.trial_model import is_partitioned

pytestmark = pytest.mark.slow

WORLD_SIZE = 2
FAMILIES = sorted(MODELS)
# They look at the shapes of loaded weights, write to them once more, have names that a renaming does not fit, or store
# each expert by itself.
LOADED_ODDLY = ("deepseek_v3", "deepseek_v4", "mixtral", "roformer", "rwkv", "youtu")
CHANGES = {"deepseek_v3": {"first_k_dense_replace": 1}}  # experts in the second layer
EXPERT = "model.layers.1.block_sparse_moe.experts.2.w1.weight"
ROUTER_BIAS = "model.layers.1.mlp.gate.e_score_correction_bias"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# In half precision a new model is drawn in float32, and only weights are rounded: gemma2 has a buffer that is not.
CASES = [
    *((name, "path", "float32") for name in FAMILIES),
    *((name, "from_scratch", "float32") for name in FAMILIES),
    *((name, "path", "float32") for name in LOADED_ODDLY),
    *((name, how, "bfloat16") for name in ("gpt2", "gemma2 with capped logits") for how in ("path", "from_scratch")),
]


def engine_config(dtype="float32", stage=3):
    """Return the configuration for deepspeed.initialize."""
    return {
        "train_batch_size": WORLD_SIZE,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "zero_optimization": {"stage": stage},
        "bf16": {"enabled": dtype == "bfloat16"},
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of each family's model."""
    root = tmp_path_factory.mktemp("models")
    for name in FAMILIES:
        make_model(name).save_pretrained(root / name)
    for name in LOADED_ODDLY:
        tiny_model(tiny_config(name, CHANGES.get(name))).save_pretrained(root / name)
    return {name: root / name for name in (*FAMILIES, *LOADED_ODDLY)}


def on_ranks(function, *arguments):
    from megaft.base import parallel

    parallel.join(parallel.discover(os.environ))
    try:
        return function(*arguments)
    finally:
        parallel.leave()


# The same model


@pytest.fixture(scope="module")
def compared(folders, run_ranks):
    """Return the differences between each case built unpartitioned and partitioned, on each rank."""
    return run_ranks(WORLD_SIZE, on_ranks, compare_all, folders)


def compare_all(folders):
    return {case: compare(folders[case[0]], *case[1:]) for case in CASES}


def compare(folder, how, dtype):
    source = ModelConfig(path=str(folder)) if how == "path" else ModelConfig(from_scratch=str(folder))
    config = replace(source, dropout=0.3, activation_checkpointing=True)
    whole = hugging_face.build(config, LoraConfig(), 3, engine_config(stage=2))
    drawn = torch.get_rng_state()
    parts = hugging_face.build(config, LoraConfig(), 3, engine_config(dtype))
    same_draws = torch.equal(drawn, torch.get_rng_state())
    said, expected = properties(parts), properties(whole)
    held = [parameter.ds_tensor.numel() for parameter in parts.parameters()]
    return {
        "weights": different(weights(whole, DTYPES[dtype]), weights(parts, DTYPES[dtype])),
        "buffers": different(dict(whole.named_buffers()), dict(parts.named_buffers())),
        "properties": {name for name in said if said[name] != expected[name]},
        "draws": [] if same_draws else ["the generator stands elsewhere"],
        "share": sum(held) / sum(parameter.numel() for parameter in whole.parameters()),
    }


def weights(model, dtype):
    import deepspeed

    assert is_partitioned(model) == (next(model.parameters()).numel() == 0)
    with deepspeed.zero.GatheredParameters(list(model.parameters())):
        return {name: parameter.detach().to(dtype).clone() for name, parameter in model.named_parameters()}


def different(ones, others):
    assert ones.keys() == others.keys()
    return [
        name
        for name, one in ones.items()
        if one.dtype != others[name].dtype or not torch.equal(one, others[name])  # not even rounded otherwise
    ]


def properties(model):
    def keeps_documents_apart():
        try:
            trials.require_document_isolation(model)
        except ConfigError:
            return False
        return True

    return {
        "names": [name for name, _ in model.named_parameters()],
        "architecture": hugging_face.architecture(model),
        "vocab_size": vocab_size(model),
        "has a linear head": hugging_face.NatsModel(model).head is not None,
        "keeps documents apart": keeps_documents_apart(),
        "dropouts": [module.p for module in model.modules() if isinstance(module, torch.nn.Dropout)],
        "checkpointing": model.is_gradient_checkpointing,
        "is tied": model.get_output_embeddings().weight is model.get_input_embeddings().weight,
    }


@pytest.mark.parametrize("what", ["weights", "buffers", "properties", "draws"])
@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_parts_are_those_of_the_whole(case, what, compared):
    assert [list(rank[case][what]) for rank in compared] == [[]] * WORLD_SIZE


@pytest.mark.parametrize("case", CASES, ids=" ".join)
def test_each_rank_holds_its_share(case, compared):
    assert [rank[case]["share"] for rank in compared] == [pytest.approx(1 / WORLD_SIZE, rel=0.01)] * WORLD_SIZE


# Mistakes: every rank ends, whoever found them


REFUSED = {
    "weights of another shape": (
        "gpt2",
        lambda folder: edit_json(folder / "config.json", n_embd=64),
        r"transformer\.h\.0\.attn\.c_attn\.bias is \[96\], not \[192\]",
    ),
    "a layer that is missing": (
        "gpt2",
        lambda folder: edit_json(folder / "config.json", n_layer=3),
        r"transformer\.h\.2\.attn\.c_attn\.bias is missing",
    ),
    "a layer too many": (
        "llama",
        lambda folder: edit_json(folder / "config.json", num_hidden_layers=1),
        r"has no model\.layers\.1\.\S+ \(9 in all\)",
    ),
    "tied in config.json, apart in the file": (
        "llama",
        lambda folder: edit_json(folder / "config.json", tie_word_embeddings=True),
        r"ties lm_head\.weight to model\.embed_tokens\.weight, but .*tie_word_embeddings",
    ),
    "tied by default, apart in the file": (
        "gpt2",
        lambda folder: add_head(folder, 1.001),  # equal in bfloat16
        r"ties lm_head\.weight to transformer\.wte\.weight, but .*tie_word_embeddings",
    ),
    "a value that is not a number": (
        "llama",
        lambda folder: change_tensors(folder, lambda tensors: tensors["model.norm.weight"][-1].fill_(math.nan)),
        r"in model\.safetensors model\.norm\.weight has 1 of 32 values that are not finite, the first at \[31\]",
    ),
    "a value of one expert that is not a number": (
        "mixtral",
        lambda folder: change_tensors(folder, lambda tensors: tensors[EXPERT][0, 1].fill_(math.nan)),
        rf"in model\.safetensors {re.escape(EXPERT)} has 1 of 1,536 values that are not finite, the first at \[0, 1\]",
    ),
    "a value that bfloat16 cannot hold": (
        "llama",
        lambda folder: change_tensors(folder, lambda tensors: tensors["model.norm.weight"][-1].fill_(3.4e38)),
        r"in bfloat16 model\.norm\.weight has 1 of 32 values .*; use float32, or copy the model again",
    ),
    "a NaN in both copies of tied weights": (
        "gpt2",
        lambda folder: (
            change_tensors(folder, lambda tensors: tensors["transformer.wte.weight"][0, 0].fill_(math.nan)),
            add_head(folder, 1),
        ),
        r"in model\.safetensors lm_head\.weight has 1 of 1,952 values .* \(2 tensors",
    ),
    "an infinite value in a buffer": (
        "deepseek_v3",
        lambda folder: change_tensors(folder, lambda tensors: tensors[ROUTER_BIAS][0].fill_(math.inf)),
        r"in model\.safetensors model\.layers\.1\.mlp\.gate\.e_score_correction_bias has 1 of",
    ),
    "an output layer that is missing": (
        "qwen2",
        lambda folder: (
            change_tensors(folder, lambda tensors: tensors.pop("lm_head.weight")),
            edit_json(folder / "config.json", tie_word_embeddings=False),
        ),
        r"lm_head\.weight is missing \(1 in all\)",
    ),
}


def add_head(folder, factor):
    change_tensors(
        folder, lambda tensors: tensors.update({"lm_head.weight": tensors["transformer.wte.weight"] * factor})
    )


def answers(folders):
    return {case: answer(folder) for case, folder in folders.items()}


def answer(folder):
    try:
        model = hugging_face.build(ModelConfig(path=str(folder)), LoraConfig(), 0, engine_config("bfloat16"))
    except DataError as error:
        return str(error)
    return properties(model)["is tied"]


@pytest.fixture(scope="module")
def answered(folders, run_ranks, tmp_path_factory):
    """Return the error of building each folder partitioned, on each rank."""
    root = tmp_path_factory.mktemp("refused")
    cases = REFUSED | {"equal under both names": ("gpt2", lambda folder: add_head(folder, 1), None)}
    for case, (name, change, _) in cases.items():
        change(shutil.copytree(folders[name], root / case))
    return run_ranks(WORLD_SIZE, on_ranks, answers, {case: root / case for case in cases})


@pytest.mark.parametrize("case", REFUSED)
def test_files_that_do_not_fit_are_refused_on_every_rank(case, answered):
    for rank in answered:
        assert re.search(REFUSED[case][2], rank[case])


def test_equal_weights_under_both_names_stay_tied(answered):
    assert [rank["equal under both names"] for rank in answered] == [True] * WORLD_SIZE


def test_other_stages_and_adapters_are_built_whole(folders):
    """Without a process group there is no collective."""
    config = ModelConfig(path=str(folders["gpt2"]))
    for lora, stage in ((LoraConfig(), 2), (LoraConfig(rank=2), 3)):
        model = hugging_face.build(config, lora, 0, engine_config(stage=stage))
        assert not is_partitioned(model)
