"""The recipes of 8.3 B: what their scripts and DeepSpeed configurations give training together."""

from pathlib import Path

import pytest

from megaft.base.errors import ConfigError
from megaft.commands.submit.batch_script import directives_of, find_script, read_script
from megaft.commands.submit.job_check import TRAINING, check_program, recipe_flags
from megaft.config.deepspeed_json import read_deepspeed_json, resolve
from megaft.config.parallelism import num_data_ranks
from megaft.config.train import parse_train

FLAGS = ["--model.path=gpt2", "--data.train=t.txt", "--run.dir=r", "--run.max-steps=3"]
LARGE = [recipe for recipe in TRAINING if "8.3b" in recipe]


def directives(recipe):
    return directives_of(read_script(find_script(recipe)))


def settings(recipe, *flags):
    return parse_train([*recipe_flags(recipe), *FLAGS, *flags])


@pytest.mark.parametrize("recipe", TRAINING)
def test_only_the_large_recipes_bring_flags(recipe):
    assert bool(recipe_flags(recipe)) == (recipe in LARGE)


@pytest.mark.parametrize(
    ("recipe", "backend", "tensor_parallel_size", "stage", "is_recomputed"),
    [
        ("finetune_megatron_8.3b_tp8", "megatron", 8, 1, False),
        ("finetune_megatron_8.3b_zero3", "hugging-face", 1, 3, True),
    ],
)
def test_what_a_large_recipe_runs(recipe, backend, tensor_parallel_size, stage, is_recomputed):
    config = settings(recipe)
    assert config.model.activation_checkpointing == is_recomputed
    assert (config.model.backend, config.parallel.tensor_parallel_size) == (backend, tensor_parallel_size)
    assert Path(config.deepspeed_config).stem == recipe.removeprefix("finetune_")
    job = directives(recipe)
    size = num_data_ranks(int(job["nodes"]) * int(job["ntasks-per-node"]), tensor_parallel_size)
    setup = resolve(read_deepspeed_json(config.deepspeed_config), world_size=size, optim=config.optim, has_cuda=True)
    assert (setup.zero_stage, setup.dtype, setup.global_batch_size) == (stage, "bfloat16", 512)


def test_ranks_that_share_a_matrix_are_on_one_node():
    """They are consecutive, so each node has whole groups of them where ranks are dealt node by node."""
    job = directives("finetune_megatron_8.3b_tp8")
    size = settings("finetune_megatron_8.3b_tp8").parallel.tensor_parallel_size
    assert job["distribution"] == "block"
    assert int(job["ntasks-per-node"]) % size == 0


@pytest.mark.parametrize("recipe", LARGE)
def test_the_users_flags_win(recipe):
    flag = (
        "no-activation-checkpointing" if settings(recipe).model.activation_checkpointing else "activation-checkpointing"
    )
    config = settings(recipe, f"--model.{flag}", "--deepspeed_config=mine.json")
    assert config.model.activation_checkpointing != settings(recipe).model.activation_checkpointing
    assert config.deepspeed_config == Path("mine.json")


def test_nodes_that_do_not_cut_the_batch_are_refused(monkeypatch):
    monkeypatch.setenv("PATH", "")  # no sbatch: model and data are another machine's
    for recipe in LARGE:
        check_program(recipe, FLAGS, directives(recipe))
        with pytest.raises(ConfigError, match="train_batch_size"):
            check_program(recipe, FLAGS, directives(recipe) | {"nodes": "3"})
