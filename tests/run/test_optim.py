import math
import sys

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from megaft.base.errors import ConfigError
from megaft.config.train import OptimConfig
from megaft.models.parameters import parameter_groups
from megaft.run.optim import build_optimizer, learning_rate, set_learning_rate
from megaft.run.plan import require_warmup_fits


def tiny_gpt2():
    return GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=32, n_positions=16))


def tiny_llama():
    config = LlamaConfig(
        num_hidden_layers=2,
        hidden_size=8,
        intermediate_size=16,
        num_attention_heads=2,
        vocab_size=32,
        attention_bias=True,
    )
    return LlamaForCausalLM(config)


def one_parameter(values):
    parameter = torch.nn.Parameter(torch.tensor(values))
    return parameter, [{"params": [parameter], "weight_decay": 0.1}]


# Groups


@pytest.mark.parametrize("make", [tiny_gpt2, tiny_llama], ids=["gpt2", "llama"])
def test_biases_and_norms_are_not_decayed(make):
    model = make()
    decayed, other = parameter_groups(model.named_parameters(), 0.1)
    assert (decayed["weight_decay"], other["weight_decay"]) == (0.1, 0.0)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    assert all(
        name.endswith("bias") or "ln_" in name or "norm" in name for name in (names[id(p)] for p in other["params"])
    )
    assert not any("bias" in names[id(p)] or "norm" in names[id(p)] or "ln_" in names[id(p)] for p in decayed["params"])
    assert len(decayed["params"]) + len(other["params"]) == len(names), "tied embeddings once, nothing lost"


def test_frozen_parameters_and_empty_groups_are_left_out():
    model = tiny_gpt2()
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.endswith("ln_f.bias")
    (group,) = parameter_groups(model.named_parameters(), 0.1)
    assert group == {"params": [model.transformer.ln_f.bias], "weight_decay": 0.0}


def test_a_partitioned_matrix_is_still_a_matrix():
    partitioned = torch.nn.Parameter(torch.empty(0))
    partitioned.ds_shape = torch.Size([4, 4])
    (group,) = parameter_groups([("weight", partitioned)], 0.1)
    assert group["weight_decay"] == 0.1


# Optimizers


def test_a_step_of_adamw_is_hand_arithmetic():
    config = OptimConfig(learning_rate=0.01, beta1=0.8, beta2=0.9, epsilon=1e-6)
    parameter, groups = one_parameter([1.0, -2.0])
    optimizer = build_optimizer(groups, config, device_type="cpu")
    value, first, second = [1.0, -2.0], [0.0, 0.0], [0.0, 0.0]
    for step, gradient in enumerate(([0.5, -1.0], [0.1, 2.0]), start=1):
        parameter.grad = torch.tensor(gradient)
        optimizer.step()
        for i, g in enumerate(gradient):  # Loshchilov and Hutter 2019, algorithm 2
            first[i] = 0.8 * first[i] + 0.2 * g
            second[i] = 0.9 * second[i] + 0.1 * g * g
            corrected = (first[i] / (1 - 0.8**step)) / (math.sqrt(second[i] / (1 - 0.9**step)) + 1e-6)
            value[i] -= 0.01 * 0.1 * value[i] + 0.01 * corrected
    assert parameter.tolist() == pytest.approx(value, rel=1e-6)


def test_two_steps_of_sgd_are_hand_arithmetic():
    parameter, groups = one_parameter([1.0])
    optimizer = build_optimizer(groups, OptimConfig(name="sgd", learning_rate=0.5, momentum=0.5), device_type="cpu")
    for _ in range(2):
        parameter.grad = torch.tensor([1.0])
        optimizer.step()
    # 1 - 0.5 * (1 + 0.1 * 1) = 0.45; the velocity is then 0.5 * 1.1 + (1 + 0.1 * 0.45) = 1.595
    assert parameter.item() == pytest.approx(0.45 - 0.5 * 1.595)


def test_adafactor_keeps_rows_and_columns_only():
    parameter, groups = one_parameter([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]])
    optimizer = build_optimizer(groups, OptimConfig(name="adafactor", learning_rate=0.01), device_type="cpu")
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    numbers = [state.numel() for state in optimizer.state[parameter].values()]
    assert sorted(numbers) == [1, 2, 3], "a step, two rows, three columns: no matrix of moments"


def test_fused_adamw_does_not_care_how_a_vector_is_cut():
    torch.manual_seed(0)
    values, gradient = torch.randn(1001), torch.randn(1001)
    results = []
    for sizes in ([1001], [333, 335, 333]):
        parts = [torch.nn.Parameter(part.clone()) for part in values.split(sizes)]
        for part, grad in zip(parts, gradient.split(sizes), strict=True):
            part.grad = grad.clone()
        optimizer = build_optimizer([{"params": parts, "weight_decay": 0.1}], OptimConfig(), device_type="cpu")
        for _ in range(5):
            optimizer.step()
        results.append(torch.cat([part.detach() for part in parts]))
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("has_apex", "has_kernels", "said"),
    [
        pytest.param(False, False, "not installed", id="none"),
        pytest.param(True, False, "another project", id="PyPI's"),
    ],
)
def test_apex_that_is_not_nvidias(has_apex, has_kernels, said, monkeypatch, tmp_path):
    if has_apex:
        (tmp_path / "apex").mkdir()
        (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    with pytest.raises(ConfigError, match=said):
        build_optimizer(one_parameter([1.0])[1], OptimConfig(name="apex-adamw"), device_type="cuda")


@pytest.mark.gpu
def test_apex_takes_torchs_step():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    pytest.importorskip("amp_C", reason="NVIDIA's apex is not installed")
    results = []
    for name in ("adamw", "apex-adamw"):
        parameter = torch.nn.Parameter(torch.linspace(-1, 1, 100, device="cuda"))
        groups = [{"params": [parameter], "weight_decay": 0.1}]
        optimizer = build_optimizer(groups, OptimConfig(name=name, learning_rate=0.01), device_type="cuda")
        for _ in range(3):
            parameter.grad = parameter.detach().sin()
            optimizer.step()
        results.append(parameter.detach())
    torch.testing.assert_close(*results)


# Schedules


@pytest.mark.parametrize(
    ("schedule", "warmup_steps", "max_steps", "rates"),  # the peak is 1
    [
        pytest.param("constant", 0, 3, [1, 1, 1], id="constant"),
        pytest.param("constant", 2, 4, [0.5, 1, 1, 1], id="constant, warm-up"),
        pytest.param("linear", 0, 5, [1, 0.8, 0.6, 0.4, 0.2], id="linear"),
        pytest.param("linear", 4, 9, [0.25, 0.5, 0.75, 1, 1, 0.8, 0.6, 0.4, 0.2], id="linear, warm-up"),
        pytest.param("cosine", 0, 3, [1, 0.6, 0.2], id="cosine, half way at half"),
        pytest.param(
            "cosine",
            1,
            6,
            [1, 1, 0.2 + 0.4 * (1 + math.sqrt(0.5)), 0.6, 0.2 + 0.4 * (1 - math.sqrt(0.5)), 0.2],
            id="cosine",
        ),
        pytest.param("cosine", 0, 1, [1], id="one step"),
        pytest.param("linear", 2, 2, [0.5, 1], id="warm-up only"),
        pytest.param("linear", 2, 3, [0.5, 1, 1], id="peak at the last step"),
    ],
)
def test_learning_rates_by_hand(schedule, warmup_steps, max_steps, rates):
    config = OptimConfig(learning_rate=1.0, schedule=schedule, warmup_steps=warmup_steps, final_fraction=0.2)
    assert [learning_rate(step, config, max_steps) for step in range(max_steps)] == pytest.approx(rates)


def test_a_run_that_goes_on_past_its_end_keeps_the_last_rate():
    config = OptimConfig(learning_rate=1.0, final_fraction=0.2)
    assert learning_rate(50, config, 10) == pytest.approx(0.2)


def test_a_warm_up_longer_than_the_run():
    require_warmup_fits(OptimConfig(warmup_steps=100), 100, 100)
    with pytest.raises(ConfigError, match=r"^--optim\.warmup-steps is 101, .*100"):
        require_warmup_fits(OptimConfig(warmup_steps=101), 101, 100)
    with pytest.raises(ConfigError, match=r"^warmup_num_steps .*--deepspeed_config is 1000 .*100"):
        require_warmup_fits(OptimConfig(), 1000, 100)


def test_set_learning_rate_reaches_every_group():
    optimizer = build_optimizer(parameter_groups(tiny_gpt2().named_parameters(), 0.1), OptimConfig(), device_type="cpu")
    set_learning_rate(optimizer, 0.125)
    assert [group["lr"] for group in optimizer.param_groups] == [0.125, 0.125]
