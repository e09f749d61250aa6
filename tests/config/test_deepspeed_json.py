import copy
import json
import subprocess
import sys

import pytest
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig, DeepSpeedZeroOffloadParamConfig

from megaft.base.errors import ConfigError
from megaft.config.deepspeed_json import largest_micro_batch_size, read_deepspeed_json, resolve
from megaft.config.deepspeed_keys import BATCH_KEYS, BLOCK_KEYS, KNOWN_KEYS
from megaft.config.train import OptimConfig

BATCH = {"train_batch_size": 16, "train_micro_batch_size_per_gpu": 4}
BF16 = {"bf16": {"enabled": True}}


def zero(**keys):
    return {"zero_optimization": keys}


def resolved(raw, world_size=1):
    return resolve(raw, world_size=world_size, optim=OptimConfig(), has_cuda=True)


# Against DeepSpeed itself


class Recorder(dict):
    """A dict that keeps the keys it is asked for."""

    asked: set

    def __contains__(self, key):
        self.asked.add(key)
        return super().__contains__(key)

    def __getitem__(self, key):
        self.asked.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.asked.add(key)
        return super().get(key, default)

    def keys(self):
        return self


def test_known_keys_are_those_deepspeeds_parser_asks_for():
    recorder = Recorder(BATCH)
    recorder.asked = set()
    DeepSpeedConfig(recorder)
    elsewhere = {"sequence_parallel_size", "data_parallel_size"}  # deepspeed.initialize
    assert set(KNOWN_KEYS) == recorder.asked | elsewhere


@pytest.mark.parametrize(
    ("block", "model"),
    [
        ("zero_optimization", DeepSpeedZeroConfig),
        ("zero_optimization.offload_optimizer", DeepSpeedZeroOffloadOptimizerConfig),
        ("zero_optimization.offload_param", DeepSpeedZeroOffloadParamConfig),
        ("bf16", DeepSpeedBF16Config),
        ("fp16", DeepSpeedFP16Config),
    ],
)
def test_keys_of_a_block_are_the_fields_of_deepspeeds_model(block, model):
    assert sorted(BLOCK_KEYS[block]) == sorted(field.alias or name for name, field in model.model_fields.items())


def test_neither_torch_nor_deepspeed_is_imported():
    code = "import sys, megaft.config.deepspeed_json; print(sorted({'torch', 'deepspeed'} & sys.modules.keys()))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


# Reading


@pytest.mark.parametrize(
    ("text", "said"),
    [
        pytest.param('{\n "bf16": {,}\n}', "line 2, column 11", id="broken"),
        pytest.param("", "line 1, column 1", id="empty file"),
        pytest.param('{"a": 1, "b": {"a": 2, "a": 3}}', "a: given twice", id="duplicate key"),
        pytest.param('{"gradient_clipping": NaN}', "NaN is not JSON", id="NaN"),
        pytest.param("[1, 2]", "holds a list", id="not an object"),
        pytest.param(b"\xff\xfe{", "byte 0 is not UTF-8", id="UTF-16"),
    ],
)
def test_a_file_that_cannot_be_read_is_named(text, said, tmp_path):
    path = tmp_path / "ds.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ConfigError, match=said) as error:
        read_deepspeed_json(path)
    assert str(path) in str(error.value)


def test_a_missing_file(tmp_path):
    with pytest.raises(ConfigError, match=r"gone.json: No such file"):
        read_deepspeed_json(tmp_path / "gone.json")


def test_a_byte_order_mark_is_no_error(tmp_path):
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(BATCH), encoding="utf-8-sig")
    assert read_deepspeed_json(path) == BATCH


# Refusals. A message names the key, and what would work or why not.

REFUSALS = [
    # keys
    ({"gradient_acumulation_steps": 8}, "did you mean gradient_accumulation_steps?"),
    ({"_comment": "x"}, "_comment is not a key of DeepSpeed"),
    (zero(stage3_prefetch_buket_size=1), "did you mean zero_optimization.stage3_prefetch_bucket_size?"),
    (zero(stage=2, offload_optimizer={"devise": "cpu"}), "did you mean zero_optimization.offload_optimizer.device?"),
    ({"fp16": {"enabled": True, "loss_scle": 0}}, "did you mean fp16.loss_scale?"),
    ({"zero_optimization": True}, "zero_optimization is true"),
    ({"bf16": True}, "bf16 is true"),
    # parallelism that is not megaft's
    ({"tensor_parallel": {"autotp_size": 2}}, "remove tensor_parallel: .*model.backend megatron"),
    ({"sequence_parallel_size": 2}, "remove sequence_parallel_size: at ZeRO 0 to 2 its gradient.*parallelism.md"),
    # values
    (zero(stage=2, reduce_bucket_size="auto"), 'zero_optimization.reduce_bucket_size is "auto"'),
    ({"gradient_clipping": "auto"}, 'gradient_clipping is "auto"'),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "auto"}}}, 'optimizer.params.lr is "auto"'),
    ({"communication_data_type": None}, "communication_data_type is null"),
    (
        {"communication_data_type": "bf16"},
        'communication_data_type is "bf16"; use "fp32"',
    ),
    (zero(stage=4), "use 0, 1, 2 or 3"),
    (zero(stage="two"), 'zero_optimization.stage is "two"'),
    (zero(stage=True), "zero_optimization.stage is true; use 0, 1, 2 or 3"),
    (zero(stage=2, overlap_comm="false"), 'overlap_comm is "false"; .*without quotes'),
    ({"bf16": {"enabled": "true"}}, 'bf16.enabled is "true"'),
    ({"bf16": {"enabled": 1}}, "bf16.enabled is 1; use true or false"),
    ({"gradient_clipping": "1.0"}, 'gradient_clipping is "1.0"'),
    ({"gradient_clipping": -1}, "gradient_clipping is -1"),
    ({"gradient_clipping": True}, "gradient_clipping is true"),
    # precision
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}, **zero(stage=1)}, "both true; enable one"),
    (BF16, "bfloat16 with zero_optimization.stage 0.*Use stage 1"),
    ({"fp16": {"enabled": True}, **zero(stage=0)}, "float16 with zero_optimization.stage 0"),
    ({"data_types": {"grad_accum_dtype": "bf16"}}, 'grad_accum_dtype is "bf16"; use "fp32"'),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}, **zero(stage=1)}, "keeps fp32 weights"),
    # what megaft does not run
    ({"amp": {"enabled": True}}, "remove amp: apex and DeepSpeed removed it"),
    ({"bfloat16": {"enabled": True}}, "old name of bf16"),
    ({"data_efficiency": {"enabled": True}}, "remove (data_efficiency|curriculum_learning)"),
    ({"curriculum_learning": {"enabled": True}}, "remove (data_efficiency|curriculum_learning)"),
    ({"pipeline": {"stages": 2}}, "remove pipeline"),
    ({"elasticity": {"enabled": True}}, "resumes on another number of GPUs"),
    ({"wandb": {"enabled": True}}, "use --metrics.wandb"),
    ({"activation_checkpointing": {}}, "use --model.activation-checkpointing"),
    ({"gradient_allreduce_op": "sum"}, 'use "mean"'),
    ({"zero_force_ds_cpu_optimizer": True}, "use false"),
    (zero(stage=3, zero_quantized_weights=True), "use false: it rounds"),
    (zero(stage=2, cpu_offload=True), "remove it: it is deprecated: write offload_optimizer"),
    (zero(stage=2, offload_optimizer={"device": "nvme"}), 'device is "nvme"'),
    (zero(stage=2, offload_param={"device": "cpu"}), "stage 3 or more, but the stage is 2"),
    (zero(stage=0, offload_optimizer={"device": "cpu"}), "stage 1 or more, but the stage is 0"),
]


@pytest.mark.parametrize(("extra", "said"), REFUSALS, ids=[said[:40] for _, said in REFUSALS])
def test_refusals(extra, said):
    with pytest.raises(ConfigError, match=said):
        resolved({**BATCH, **extra})


def test_a_block_that_is_switched_off_asks_for_nothing():
    ours = resolved({**BATCH, "amp": {"enabled": False}, "wandb": {"enabled": False}, "sparse_gradients": False})
    assert not {"amp", "wandb", "sparse_gradients"} & ours.engine_config.keys()


# Batch sizes: (train_batch_size, micro-batch, accumulation), None or "auto" where the JSON has none


def batch_json(train, micro, accumulation):
    given = zip(BATCH_KEYS, (train, micro, accumulation), strict=True)
    return {key: value for key, value in given if value is not None}


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),
    [
        pytest.param((16, 4, 2), 2, (16, 4, 2), id="all three"),
        pytest.param((16, 4, None), 2, (16, 4, 2), id="accumulation follows"),
        pytest.param((16, None, 2), 2, (16, 4, 2), id="micro-batch follows"),
        pytest.param((None, 4, 2), 2, (16, 4, 2), id="batch follows"),
        pytest.param((16, None, None), 2, (16, 8, 1), id="batch alone"),
        pytest.param((None, 4, None), 2, (8, 4, 1), id="micro-batch alone"),
        pytest.param((16, 4, "auto"), 4, (16, 4, 1), id="auto is filled"),
        pytest.param(("auto", 4, "auto"), 1, (4, 4, 1), id="auto twice"),
    ],
)
def test_batch_sizes(given, world_size, expected):
    ours = resolved(batch_json(*given), world_size)
    assert (ours.global_batch_size, ours.micro_batch_size, ours.gradient_accumulation_steps) == expected
    assert batch_json(*expected).items() <= ours.engine_config.items()


@pytest.mark.parametrize(
    ("given", "world_size", "choices"),  # the three that are printed: (batch, micro-batch, accumulation)
    [
        pytest.param((16, 4, 3), 2, [(16, 4, 2), (24, 4, 3), (32, 4, 4)], id="product is another"),
        pytest.param((12, 4, None), 2, [(12, 3, 2), (8, 4, 1), (16, 4, 2)], id="a remainder"),
        pytest.param((10, None, None), 4, [(8, 2, 1), (16, 2, 2), (24, 2, 3)], id="ranks do not divide"),
        pytest.param((2, None, None), 4, [(4, 1, 1), (8, 1, 2), (12, 1, 3)], id="fewer than ranks"),
        pytest.param((16, None, 3), 1, [(16, 4, 4), (15, 5, 3), (20, 5, 4)], id="accumulation does not divide"),
    ],
)
def test_impossible_batches_come_with_three_that_are_possible(given, world_size, choices):
    with pytest.raises(ConfigError, match=rf"on {world_size} ranks?:") as error:
        resolved(batch_json(*given), world_size)
    for train, micro, accumulation in choices:
        keys = zip(BATCH_KEYS, (train, micro, accumulation), strict=True)
        assert ", ".join(f"{key} {value}" for key, value in keys) in str(error.value).partition(" Use ")[2]
        resolved(batch_json(train, micro, accumulation), world_size)


@pytest.mark.parametrize("batch", [{}, {"gradient_accumulation_steps": 4}, {"train_batch_size": "auto"}])
def test_no_batch_size(batch):
    with pytest.raises(ConfigError, match=r"no batch size.*train_batch_size"):
        resolved(batch)


@pytest.mark.parametrize("value", [0, -4, 2.0, "4", True])
def test_a_batch_size_is_a_positive_whole_number(value):
    with pytest.raises(ConfigError, match="train_batch_size is"):
        resolved({"train_batch_size": value})


@pytest.mark.parametrize(("world_size", "expected"), [(1, 8), (2, 8), (3, 8), (4, 6), (8, 6), (16, 3), (48, 1)])
def test_largest_micro_batch(world_size, expected):
    assert largest_micro_batch_size(48, 8, world_size) == expected


def test_ranks_that_do_not_divide_the_batch():
    with pytest.raises(ConfigError, match=r"train_batch_size is 48, .*multiple of 5"):
        largest_micro_batch_size(48, 8, 5)


# What is filled in


def test_the_json_is_left_alone_and_the_rest_filled_in():
    raw = {**BATCH, **BF16, **zero(stage=2, offload_optimizer={"device": "cpu"}), "gradient_clipping": 1}
    before = copy.deepcopy(raw)
    ours = resolved(raw, 2)
    assert raw == before
    assert (ours.dtype, ours.zero_stage, ours.offload_optimizer, ours.gradient_clipping) == ("bfloat16", 2, True, 1.0)
    assert ours.engine_config == {
        **raw,
        "bf16": {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True},
        "gradient_accumulation_steps": 2,
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "timers": {"throughput": {"enabled": False}},
    }
    assert not [note for note in ours.notes if "grad_accum_dtype" in note]


def test_gradients_are_clipped_as_deepspeed_does_by_default():
    ours = resolved(BATCH)
    assert ours.gradient_clipping == ours.engine_config["gradient_clipping"] == 1.0
    assert [note for note in ours.notes if "gradient_clipping" in note]
    assert not [note for note in resolved({**BATCH, "gradient_clipping": 0.5}).notes if "gradient_clipping" in note]
    assert DeepSpeedConfig(dict(BATCH)).gradient_clipping == 1.0
