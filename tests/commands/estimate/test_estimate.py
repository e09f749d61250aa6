"""`megaft estimate`: counts checked by hand, and changes that make a run fit."""

import json
from pathlib import Path

import pytest

from megaft.base.errors import ConfigError, DataError
from megaft.base.hardware import GPUS, PUBLISHED, data_sheet_flops
from megaft.cli import main
from megaft.commands.estimate.command import estimate, lines
from megaft.commands.estimate.config import EstimateConfig
from megaft.commands.estimate.memory import MicroBatch, activations, boundary_elements, flat_size
from megaft.commands.estimate.recipe import Recipe
from megaft.config.train import OptimConfig
from megaft.weights.dimensions import num_elements
from megaft.weights.families import FAMILIES, dimensions_of, model_dimensions
from megaft.weights.presets import PRESETS, configuration

JSONS = Path(__file__).parents[3] / "ds_configs"
MIB = 2**20


def recipe(preset="gpt2", *, zero=None, half=None, batch=8, micro=4, **fields):
    settings = {"train_batch_size": batch, "train_micro_batch_size_per_gpu": micro, "zero_optimization": zero or {}}
    settings |= {half: {"enabled": True}} if half else {}
    dims = dimensions_of(PRESETS[preset], dropout=0.0)
    return Recipe(dims=dims, deepspeed=settings, context_length=1024, optim=OptimConfig(), **fields)


# transformers' and the makers' own counts
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        ("gpt2-xl", 1_557_611_200),
        ("llama-2-7b", 6_738_415_616),
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.2-1b", 1_235_814_400),
        ("smollm2-135m", 134_515_008),
        ("smollm2-1.7b", 1_711_376_384),
        # 12 L d^2 + 13 L d + (V + T + 2) d, with L 72, d 3072, V 51,200, T 1024
        ("megatron-8.3b", 12 * 72 * 3072**2 + 13 * 72 * 3072 + (51_200 + 1024 + 2) * 3072),
    ],
)
def test_parameters(name, expected):
    assert dimensions_of(PRESETS[name]).num_parameters == expected


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "llama-3.2-1b", "llama-3.1-8b"])
def test_weights_are_those_of_transformers(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PRESETS[name]))
    shapes = [tuple(sorted(parameter.shape)) for parameter in model.parameters()]
    ours = dimensions_of(PRESETS[name]).parameter_shapes()
    assert sorted(tuple(sorted(shape)) for shape in ours.elements()) == sorted(shapes)


def test_a_cut_keeps_norms_and_cuts_matrices():
    dims = dimensions_of(PRESETS["gpt2"])
    whole, half = dims.parameter_shapes(1, is_fused=True), dims.parameter_shapes(2, is_fused=True)
    # 50,257 words become 25,129 on each of two ranks; positions, norms and biases of rows stay whole.
    assert half[25_129, 768] == 1
    assert half[1024, 768] == whole[1024, 768] == 1
    replicated = 1024 * 768 + 12 * (4 + 2) * 768 + 2 * 768
    assert 2 * num_elements(half) - num_elements(whole) == replicated + 768


def test_flat_buffers_are_padded_for_the_ranks():
    weights = dimensions_of(PRESETS["gpt2"]).parameter_shapes()
    vectors = 12 * (4 * 768 + 3 * 768 + 768 + 3072 + 768) + 2 * 768
    matrices = 124_439_808 - vectors
    assert flat_size(weights, 7) == (matrices + -matrices % 14) + (vectors + -vectors % 14)


@pytest.mark.parametrize(
    ("sizes", "num_ranks", "expected"),
    [((4, 4), 2, [0, 0]), ((3, 5), 2, [4, 1]), ((8,), 4, [6] * 4), ((6, 2), 4, [4, 4, 4, 0]), ((7,), 1, [0])],
)
def test_parameters_that_a_partition_cuts_through(sizes, num_ranks, expected):
    assert [boundary_elements(sizes, num_ranks, rank) for rank in range(num_ranks)] == expected
    assert boundary_elements(sizes, num_ranks) == max(expected)


@pytest.mark.parametrize("name", ["gpt2", "smollm2-135m", "llama-3.1-8b"])
def test_matrices_are_in_the_order_of_transformers(name):
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**PRESETS[name]))
    expected = tuple(parameter.numel() for parameter in model.parameters() if parameter.ndim == 2)
    assert dimensions_of(PRESETS[name]).matrices_in_order() == expected


N, D = 124_439_808, 2


@pytest.mark.parametrize(
    ("stage", "half", "expected"),  # bytes a parameter: weights, masters, moments, gradients at their fullest
    [
        pytest.param(0, None, (4, 0, 8, 4), id="no ZeRO"),
        pytest.param(1, None, (4, 4 / D, 8 / D, 4), id="stage 1, fp32"),
        pytest.param(2, None, (4, 4 / D, 8 / D, 2.0496), id="stage 2, fp32: a matrix lies on both ranks"),
        pytest.param(1, "bf16", (2, 4 / D, 8 / D, 4), id="stage 1, bf16"),
        pytest.param(1, "fp16", (2, 4 / D, 8 / D, 4), id="stage 1, fp16"),
        pytest.param(2, "bf16", (2, 4 / D, 8 / D, 4 / D), id="stage 2, bf16"),
        pytest.param(3, "bf16", (2 / D, 4 / D, 8 / D, 4 / D), id="stage 3, bf16"),
    ],
)
def test_bytes_of_a_parameter(stage, half, expected):
    held = recipe(zero={"stage": stage}, half=half, world_size=D).footprint().states
    found = held.weights, held.master_weights, held.optimizer, held.gradients
    assert [size / N for size in found] == pytest.approx(expected, rel=2e-3)  # stage 3 keeps vectors whole


def test_offloading_moves_masters_and_moments_to_the_host():
    zero = {"stage": 3, "offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    held = recipe(zero=zero, half="bf16", world_size=D).footprint().states
    assert (held.master_weights, held.optimizer, held.gradients) == (0, 0, 0)
    assert held.host == pytest.approx((2 + 4 + 8 + 8) * N / D, rel=1e-3)
    assert held.weights < 0.01 * 2 * N


def test_activations_by_hand():
    # GPT-2, bf16, 2,048 tokens; a layer: 2 norms' inputs and outputs, q, k, v, attention's output, and of the inner
    # layer (4 wide) GELU's input and output, all of 768 x 2 bytes; 12 fp32 numbers of attention and 4 of norms.
    work = MicroBatch(dims=dimensions_of(PRESETS["gpt2"], 0.0), micro_batch_size=2, context_length=1024)
    layer = 2048 * (768 * 2 * (4 + 3 + 1 + 4 * 2) + 4 * (12 + 4))
    around = 2048 * (768 * 2 + 24)
    assert activations(work).saved == 12 * layer + around
    recomputed = MicroBatch(dims=work.dims, micro_batch_size=2, context_length=1024, is_recomputed=True)
    assert activations(recomputed).saved == 12 * 2048 * 768 * 2 + around


@pytest.mark.parametrize("name", sorted(PRESETS))
def test_more_never_needs_less(name):
    dims = dimensions_of(PRESETS[name])

    def saved(**changed):
        return activations(MicroBatch(**{"dims": dims, "micro_batch_size": 2, "context_length": 1024} | changed)).saved

    assert saved(is_recomputed=True) < saved() < saved(micro_batch_size=4) == 2 * saved()
    assert saved(element_bytes=4) > saved()
    assert saved(is_megatron=True, tensor_parallel_size=dims.num_groups) < saved(is_megatron=True)


@pytest.fixture
def command(tmp_path, capsys):
    """command(flags) runs `megaft estimate --json` with ds_configs/zero1_bf16.json, unless another is given."""

    def run(*flags):
        given = [] if any(flag.startswith("--deepspeed-config") for flag in flags) else ["--deepspeed-config"]
        given += [str(JSONS / "zero1_bf16.json")] if given else []
        assert main(["estimate", *flags, *given, "--json"]) == 0
        return json.loads(capsys.readouterr().out)

    return run


def test_what_fits(command):
    found = command("--model=gpt2", "--tokens=1e9")
    assert found["fits"]
    assert found["changes"] == []
    assert found["peak_bytes"] == sum(found["components"].values()) == max(found["moments"].values())
    assert found["parameters"] == N
    assert found["checkpoint_bytes"] == 12 * N
    assert found["export_bytes"] == 4 * N
    assert found["flops_per_token"] == 6 * N + 12 * 12 * 768 * 1024
    low, high = found["tokens_per_second"]
    assert low == pytest.approx(0.33 * 989e12 / found["flops_per_token"])
    assert high > low
    assert found["days"] == pytest.approx([1e9 / low / 86_400, 1e9 / high / 86_400])


def test_what_does_not_fit_says_what_would(command):
    found = command("--model=gpt2-xl", "--hardware=a100-40gb")
    ways = [way["settings"] for way in found["changes"]]
    assert not found["fits"]
    assert 0 < len(ways) <= 3
    assert all(way["peak_bytes"] <= found["available_bytes"] for way in found["changes"])
    assert ways[0] == ["train_micro_batch_size_per_gpu 4"], "the least invasive first"
    assert not any(set(ways[0]) < set(other) for other in ways[1:])


def test_a_change_that_is_said_to_help_does(command, tmp_path):
    before = command("--model=gpt2-xl", "--hardware=a100-40gb")
    settings = json.loads((JSONS / "zero1_bf16.json").read_text()) | {"train_micro_batch_size_per_gpu": 4}
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    after = command("--model=gpt2-xl", "--hardware=a100-40gb", f"--deepspeed-config={tmp_path / 'ds.json'}")
    assert after["fits"]
    assert after["peak_bytes"] == before["changes"][0]["peak_bytes"]


def test_gpt2_xl_fits_one_gpu_of_80_gb_at_micro_batch_16(command):
    found = command("--model=gpt2-xl", f"--deepspeed-config={JSONS / 'gpt2_xl_1x80gb.json'}", "--dropout=0.1")
    assert found["micro_batch_size"] == 16
    assert found["fits"]


def test_a_model_too_large_for_everything(command):
    found = command("--model=llama-3.1-70b", "--hardware=t4", "--context-length=131072")
    assert not found["fits"]
    assert found["changes"] == []


@pytest.mark.parametrize("path", sorted(JSONS.glob("*.json")), ids=lambda path: path.stem)
def test_every_shipped_json_can_be_estimated(path):
    config = EstimateConfig(model="gpt2", deepspeed_config=path, world_size=2, tokens=1e9)
    assert any("GiB" in line for line in lines(estimate(config)))


def test_no_speed_is_promised_in_float32(command):
    found = command("--model=gpt2", f"--deepspeed-config={JSONS / 'zero1_fp32.json'}")
    assert found["tokens_per_second"] is None
    assert found["mfu"] is None


@pytest.mark.parametrize("hardware", sorted(GPUS))
@pytest.mark.parametrize("half", ["bf16", "fp16"])
def test_a_gpu_without_bf16_is_told(command, hardware, half):
    flags = [f"--deepspeed-config={JSONS / f'zero1_{half}.json'}", f"--hardware={hardware}", "--model=gpt2"]
    found = command(*flags)
    can = half == "fp16" or hardware not in ("v100", "v100-32gb", "t4")
    assert found["has_dtype"] == can
    assert (found["tokens_per_second"] is not None) == can
    assert any("does NOT compute in bf16: use fp16" in line for line in lines(found)) != can


@pytest.mark.parametrize(
    ("flags", "expected", "absent"),
    [
        (["--hardware=h100"], "as published for H100:", "if it did fit"),
        (["--hardware=a100"], "as published for H100; no published MFU for the A100-SXM4-80GB:", "if it did fit"),
        (["--hardware=a100-40gb", "--tokens=1e9"], "if it did fit, 0.756 to 1.16 days", "no published MFU for a "),
    ],
)
def test_whose_speed_it_is(command, flags, expected, absent):
    text = "\n".join(lines(command("--model=gpt2-xl", *flags)))
    assert expected in text
    assert absent not in text


def test_a_change_that_offloads_says_what_the_host_has_to_hold(command):
    found = command("--model=gpt2-xl", "--hardware=t4", f"--deepspeed-config={JSONS / 'zero2_fp16.json'}")
    for way in found["changes"]:
        assert ("offload" in " ".join(way["settings"])) == (way["offloaded_bytes"] > 0)
    # weights in fp16, fp32 masters, two moments, gradients: 2 + 4 + 8 + 4 bytes a parameter, and the largest once more
    largest = 50_257 * 1600
    assert found["changes"][0]["offloaded_bytes"] == pytest.approx(18 * 1_557_611_200 + 2 * largest, rel=1e-6)
    assert any("26.26 GiB per rank on the host" in line for line in lines(found))


def test_a_folder_of_a_model(command, tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(PRESETS["smollm2-135m"]))
    assert command(f"--model={tmp_path}")["parameters"] == 134_515_008


@pytest.mark.parametrize("model", [{"path": "smollm2-135m", "from_scratch": None}, {"from_scratch": "FOLDER"}])
def test_a_run_s_folder(command, tmp_path, model):
    """Before its export, a run's settings name the model; a model that is not there is named."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text(json.dumps(PRESETS["smollm2-135m"]))
    named = {key: value and value.replace("FOLDER", str(tmp_path / "model")) for key, value in model.items()}
    (tmp_path / "config.json").write_text(json.dumps({"model": named, "deepspeed": {}}))
    assert command(f"--model={tmp_path}")["parameters"] == 134_515_008
    (tmp_path / "config.json").write_text(json.dumps({"model": {"path": "/gone"}, "deepspeed": {}}))
    with pytest.raises(ConfigError, match=rf"--model is {tmp_path}, a run that trains /gone"):
        configuration(str(tmp_path))
    (tmp_path / "export").mkdir()
    (tmp_path / "export" / "config.json").write_text(json.dumps(PRESETS["smollm2-360m"]))
    assert command(f"--model={tmp_path}")["parameters"] == 361_821_120


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model=gpt3"], "or one of gpt2"),
        (["--model=gpt2", "--hardware=h1000"], "hardware is h1000"),
        (["--model=gpt2", "--tensor-parallel-size=2", "--world-size=2"], "--backend megatron"),
        (["--model=gpt2", "--backend=megatron", "--tensor-parallel-size=2"], "a multiple"),
        (
            ["--model=gpt2", "--backend=megatron", "--tensor-parallel-size=5", "--world-size=5"],
            "12 KV heads and MLP width of 3072 are not both divisible by 5",
        ),
        (["--model=gpt2", "--context-length=2048"], "1024 positions"),
        (["--model=gpt2", "--world-size=3"], "train_batch_size must be"),
    ],
)
def test_what_is_refused(flags, message, capsys):
    assert main(["estimate", *flags, f"--deepspeed-config={JSONS / 'zero1_bf16.json'}"]) == 2
    assert message in capsys.readouterr().err


def test_a_configuration_that_cannot_be_read(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(DataError, match=r"config\.json is damaged"):
        configuration(str(tmp_path))
    with pytest.raises(ConfigError, match=", ".join(FAMILIES)):
        dimensions_of({"model_type": "t5"})


GPT2 = {"model_type": "gpt2"}
LLAMA = {"model_type": "llama"}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({**GPT2, "n_layer": "three"}, "n_layer is 'three'; it must be a whole number of 1 or more."),
        ({**GPT2, "n_layer": -3}, "n_layer is -3; it must be a whole number"),
        ({**GPT2, "n_layer": None}, "n_layer is None; it must be a whole number"),
        ({**GPT2, "n_embd": 76.8}, "n_embd is 76.8; it must be a whole number"),
        ({**GPT2, "n_inner": 0}, "n_inner is 0; it must be a whole number"),
        ({**GPT2, "vocab_size": True}, "vocab_size is True; it must be a whole number"),
        ({**GPT2, "n_embd": 770}, "n_embd is 770 and n_head is 12; the first must be a multiple of the second."),
        ({**GPT2, "resid_pdrop": 2}, "resid_pdrop is 2; it must be a number from 0 to less than 1."),
        ({**GPT2, "tie_word_embeddings": "no"}, "tie_word_embeddings is 'no'; it must be true or false."),
        ({**LLAMA, "num_attention_heads": 0}, "num_attention_heads is 0; it must be a whole number"),
        ({**LLAMA, "hidden_size": 100}, "hidden_size is 100 and num_attention_heads is 32;"),
        ({**LLAMA, "num_key_value_heads": 5}, "num_attention_heads is 32 and num_key_value_heads is 5;"),
        ([], "is a JSON list, not an object"),
    ],
)
def test_sizes_that_make_no_model(config, message, tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(config))
    flags = ["estimate", f"--model={tmp_path}", f"--deepspeed-config={JSONS / 'zero1_bf16.json'}"]
    assert main(flags) == 3
    error = capsys.readouterr().err
    assert str(tmp_path / "config.json") in error
    assert message in error
    assert "Traceback" not in error


@pytest.mark.parametrize(
    ("changes", "size", "is_refused"),
    [({}, 4, False), ({}, 5, True), ({"n_head": 16, "n_embd": 64}, 8, False), ({"n_inner": 6}, 4, True)],
    ids=str,
)
def test_a_cut_is_refused_as_training_refuses_it(changes, size, is_refused):
    from transformers import GPT2Config

    def refusal(check):
        try:
            check()
        except ConfigError as error:
            return str(error)
        return None

    def estimated():
        zeros = {"train_batch_size": 8, "train_micro_batch_size_per_gpu": 8}
        dims = dimensions_of(GPT2 | changes)
        sizes = {"world_size": size, "tensor_parallel_size": size, "context_length": 1024}
        Recipe(dims=dims, deepspeed=zeros, is_megatron=True, optim=OptimConfig(), **sizes)

    refused = refusal(estimated)
    assert (refused is not None) == is_refused
    assert refused == refusal(
        lambda: model_dimensions(GPT2Config(**changes)).require_shardable(size, "--tensor-parallel-size")
    )


def test_every_gpu_has_a_peak():
    assert all(data_sheet_flops(gpu.name) for gpu in GPUS.values())
    assert all(0 < one.lowest <= one.highest < 1 for one in PUBLISHED)


def test_the_estimate_says_what_dropout_costs(command):
    found = command("--model=gpt2-xl", "--dropout=0.1")
    assert found["attention_kernel"] == "FlashAttention"
    assert "0.125" in "\n".join(lines(found))
    faster = command("--model=gpt2-xl", "--dropout=0.125")
    assert faster["attention_note"] is None
    assert faster["predicted_tokens_per_second"] > found["predicted_tokens_per_second"]
    assert command("--model=gpt2")["attention_note"], "GPT-2's own dropout is 0.1"
    assert command("--model=smollm2-135m")["attention_note"] is None


def test_rates_are_predicted_for_every_rank(command):
    low, high = command("--model=gpt2-xl", "--dropout=0")["predicted_tokens_per_second"]
    assert low < high
    ranks = command("--model=gpt2-xl", "--dropout=0", "--world-size=8")["predicted_tokens_per_second"]
    assert ranks[0] == pytest.approx(8 * low, rel=0.02)
    recomputed = command("--model=gpt2-xl", "--dropout=0", "--activation-checkpointing")
    assert recomputed["predicted_tokens_per_second"][0] == pytest.approx(low * 3 / 4, rel=0.05)
