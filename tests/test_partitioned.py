"""ZeRO-3 from the first weight on: models built in parts are the models that are built whole."""

import os
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_models import MODELS, make_model

from megaft.config import LoraConfig, ModelConfig
from megaft.errors import ConfigError, DataError
from megaft.models import hugging_face, trials
from megaft.models.stand_in import is_partitioned

WORLD_SIZE = 2
FAMILIES = sorted(MODELS)
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# In half precision a new model is drawn in float32, and only weights are rounded: gemma2 has a buffer that is not.
CASES = [
    *((name, "path", "float32") for name in FAMILIES),
    *((name, "from_scratch", "float32") for name in FAMILIES),
    *((name, how, "bfloat16") for name in ("gpt2", "gemma2 with capped logits") for how in ("path", "from_scratch")),
]


def engine_config(dtype="float32", stage=3):
    """What deepspeed.initialize gets."""
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
    return {name: root / name for name in FAMILIES}


def on_ranks(function, *arguments):
    from megaft import parallel

    parallel.join(parallel.discover(os.environ))
    try:
        return function(*arguments)
    finally:
        parallel.leave()


# The same model


@pytest.fixture(scope="module")
def compared(folders, run_ranks):
    """What differs between each case built whole and in parts, on each rank."""
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
            trials.require_keeps_documents_apart(model)
        except ConfigError:
            return False
        return True

    return {
        "names": [name for name, _ in model.named_parameters()],
        "architecture": hugging_face.architecture(model),
        "vocab_size": hugging_face.vocab_size(model),
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


def refused(folder):
    with pytest.raises(DataError) as error:
        hugging_face.build(ModelConfig(path=str(folder)), LoraConfig(), 0, engine_config())
    return str(error.value)


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        (
            "weights of another shape",
            ('"n_embd": 32', '"n_embd": 64'),
            ["size mismatch for transformer", "rank 0 could"],
        ),
        (
            "a layer that is missing",
            ('"n_layer": 2', '"n_layer": 3'),
            ["transformer.h.2.attn.c_attn.bias is missing"] * 2,
        ),
    ],
)
def test_files_that_do_not_fit_are_refused_on_every_rank(name, change, said, folders, run_ranks, tmp_path):
    folder = shutil.copytree(folders["gpt2"], tmp_path / name)
    config = (folder / "config.json").read_text()
    assert change[0] in config
    (folder / "config.json").write_text(config.replace(*change))
    for message, part in zip(run_ranks(WORLD_SIZE, on_ranks, refused, folder), said, strict=True):
        assert part in message


def test_other_stages_and_adapters_are_built_whole(folders):
    """Without a process group: nothing is asked of other ranks."""
    config = ModelConfig(path=str(folders["gpt2"]))
    for lora, stage in ((LoraConfig(), 2), (LoraConfig(rank=2), 3)):
        model = hugging_face.build(config, lora, 0, engine_config(stage=stage))
        assert not is_partitioned(model)
