"""Extension points: an optimizer, schedule, guard policy, model family or command is one table entry."""

import math
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import get_args

import pytest
import torch
from plain_engine import PlainEngine
from tiny_models import LLAMA, logits_of, make_config

from megaft import cli
from megaft.base.errors import ConfigError
from megaft.checkpoint import engine_state
from megaft.checkpoint.run_state import RunState
from megaft.config.deepspeed_json import resolve
from megaft.config.deepspeed_keys import BlockTranslation
from megaft.config.optimizers import OPTIMIZERS, Optimizer, OptimizerName, help_texts
from megaft.config.policies import POLICIES, NonFinitePolicy, Policy, SpikePolicy
from megaft.config.schedules import SCHEDULES, Schedule, ScheduleName
from megaft.config.train import GuardConfig, OptimConfig, bytes_per_parameter
from megaft.models.parameters import parameter_groups
from megaft.run.guard import Guard
from megaft.run.optim import build_optimizer, learning_rate
from megaft.run.recovery import recover
from megaft.weights.families import FAMILIES, dimensions_of


def resolved(optim=None, **blocks):
    return resolve(
        {"train_batch_size": 16, **blocks}, world_size=1, optim=OptimConfig(**(optim or {})), has_cuda=False
    ).optim


def test_the_choices_of_the_flags_are_the_tables_names():
    assert get_args(OptimizerName) == (*OPTIMIZERS,)
    assert get_args(ScheduleName) == (*SCHEDULES,)
    assert get_args(SpikePolicy) == (*POLICIES,)
    assert set(get_args(NonFinitePolicy)) == set(POLICIES) - {"ignore"}


@pytest.mark.parametrize("name", [name for name, one in OPTIMIZERS.items() if one.cpu_equivalent is None])
def test_an_optimizers_states_are_the_tables(name):
    """A checkpoint's size is computed from these states; Adafactor keeps less of a matrix."""
    optim = replace(OptimConfig(), name=name, momentum=0.9 if name == "sgd" else 0.0)
    assert states_after_a_step(optim) == {"weight", *OPTIMIZERS[name].moments} - {"step"}


def states_after_a_step(optim):
    """Return the kinds of state that a checkpoint has for a vector."""
    engine = PlainEngine(fill=1.0)
    engine.module.weight.requires_grad = False
    engine.optimizer = build_optimizer(
        parameter_groups(engine.module.named_parameters(), optim.weight_decay), optim, device_type="cpu"
    )
    values = {kind: values for _, kind, _, values in engine_state.collect(engine)}
    assert all(moment.max() <= optim.epsilon for kind, moment in values.items() if kind != "weight")  # as initialized
    return set(values)


def test_an_optimizer(monkeypatch):
    adamax = Optimizer(
        class_name="torch.optim.Adamax",
        arguments={"betas": ("beta1", "beta2"), "eps": "epsilon"},
        moments={"exp_avg": None, "exp_inf": None},
        block=BlockTranslation(types=("Adamax",), takes={"lr": ("learning_rate", 1e-3)}, only={}),
    )
    monkeypatch.setitem(OPTIMIZERS, "adamax", adamax)
    optim = resolved(optimizer={"type": "Adamax", "params": {"lr": 0.5}})
    assert (optim.name, optim.learning_rate) == ("adamax", 0.5)
    with pytest.raises(ConfigError, match=r"optim\.momentum is 0\.9, .* adamax"):
        resolved({"name": "adamax", "momentum": 0.9})
    assert "adamax is torch.optim.Adamax" in help_texts()["name"]
    assert "adamax" in help_texts()["beta1"]
    assert "adamax" not in help_texts()["weight_decay"]
    monkeypatch.setitem(OPTIMIZERS, "adamax", replace(adamax, decouples_weight_decay=False))
    assert "decoupled, except with sgd and adamax" in help_texts()["weight_decay"]
    assert bytes_per_parameter(optim) == 12
    assert states_after_a_step(optim) == {"weight", "exp_avg", "exp_inf"}
    parameter = torch.nn.Parameter(torch.tensor([1.0, -1.0]))
    parameter.grad = torch.tensor([0.3, 0.1])
    build_optimizer([{"params": [parameter], "weight_decay": 0.0}], optim, device_type="cpu").step()
    assert parameter.tolist() == pytest.approx([0.5, -1.5])  # Adam by the largest gradient: its first step is the rate


def test_a_schedule(monkeypatch):
    block = BlockTranslation(types=("WarmupSqrtLR",), takes={"warmup_num_steps": ("warmup_steps", 1)}, only={})
    monkeypatch.setitem(SCHEDULES, "sqrt", Schedule(remaining=lambda progress: 1 - math.sqrt(progress), block=block))
    optim = resolved({"learning_rate": 2.0, "final_fraction": 0.5}, scheduler={"type": "WarmupSqrtLR"})
    assert (optim.schedule, optim.warmup_steps) == ("sqrt", 1)
    assert [learning_rate(step, optim, 6) for step in (0, 1, 2, 5)] == [2.0, 2.0, 1.5, 1.0]


def test_a_guard_policy(monkeypatch):
    """A policy that records a spike and keeps the step."""
    monkeypatch.setitem(POLICIES, "note", Policy(moves_weights=True, then="go on"))
    config = GuardConfig(spike="note", spike_window=32)
    guard = Guard(config, {}, smallest_loss_scale=None)
    rows = [{"step": step, "loss": 3 + step % 2 / 9, "grad_norm": 1.0, "skipped_steps": 0} for step in range(1, 40)]
    rows[35]["loss"] = rows[37]["loss"] = 99.0
    bad_steps = guard.judge(rows)
    assert [(bad_step.step, bad_step.decision) for bad_step in bad_steps] == [(36, "note"), (38, "note")]
    assert guard.accepts(40, 99.0, 1.0)
    assert not guard.needs_norm_before_update
    assert not config.goes_back
    events = []
    run = SimpleNamespace(
        batch_split=SimpleNamespace(global_batch_size=8),
        events=SimpleNamespace(record=lambda event, step, **fields: events.append((event, step, fields["samples"]))),
    )
    state = RunState(step=40, position=320)
    assert recover(run, bad_steps[0], state) is state
    assert events == [("loss spike", 36, ((280, 288),))]


# ByteDance's Seed-OSS, a Llama with biases of queries, keys and values only, as Qwen2 has them.
SEED_OSS = LLAMA | {"attention_bias": True, "attention_out_bias": False, "mlp_bias": False, "residual_dropout": 0.0}


def save_seed_oss(folder):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(make_config("seed_oss", SEED_OSS)).save_pretrained(folder)


def test_a_model_family_is_counted_and_converted(monkeypatch, tmp_path):
    from safetensors.torch import load_file

    from megaft.weights.reading import open_weights
    from megaft.weights.writing import write_hugging_face, write_megatron

    monkeypatch.setitem(FAMILIES, "seed_oss", FAMILIES["qwen2"])
    save_seed_oss(tmp_path / "model")
    weights = open_weights(str(tmp_path / "model"))
    assert dimensions_of(weights.config.to_dict()).num_parameters == weights.num_parameters
    for name in ("cut", "back"):
        (tmp_path / name).mkdir()
    write_megatron(weights, tmp_path / "cut", torch.float32, 2, "seed_oss")
    write_hugging_face(open_weights(str(tmp_path / "cut")), tmp_path / "back", torch.float32)
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("model", "back"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def difference_of_logits(folder):
    import os

    from transformers import AutoModelForCausalLM

    from megaft.base import parallel
    from megaft.models.megatron_generation import load_cached_shard

    FAMILIES["seed_oss"] = FAMILIES["qwen2"]
    parallel.join(parallel.discover(os.environ))
    parallel.start_tensor_parallelism(1)
    tokens = [*range(1, 20)]
    reference = logits_of(AutoModelForCausalLM.from_pretrained(folder), torch.tensor([tokens]))[0, -1]
    with torch.no_grad():
        found = load_cached_shard(str(folder), torch.float32, torch.device("cpu")).forward(tokens, 0)
    return float((found - reference).abs().max())


@pytest.mark.slow
def test_a_model_family_computes(run_ranks, tmp_path):
    save_seed_oss(tmp_path)
    (difference,) = run_ranks(1, difference_of_logits, tmp_path)
    assert difference < 1e-5  # fp32: the order of sums


@dataclass(frozen=True, kw_only=True)
class GreetConfig:
    """Greet somebody."""

    name: str


def test_a_command(monkeypatch, capsys):
    module = ModuleType("megaft.commands.greet")
    vars(module).update(GreetConfig=GreetConfig, main=lambda config: print(f"hello {config.name}") or 0)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    commands: Mapping = cli.COMMANDS
    entry = cli.Command("say hello", "commands.greet", "commands.greet:GreetConfig")
    monkeypatch.setitem(commands, "greet", entry)
    assert cli.main(["greet", "--name=you"]) == 0
    assert cli.main(["--help"]) == 0
    said = capsys.readouterr().out
    assert "hello you" in said
    assert "say hello" in said
