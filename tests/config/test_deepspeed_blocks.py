"""The optimizer and scheduler blocks of a DeepSpeed JSON, and optimizers that would not be themselves."""

import pytest

from megaft.base.errors import ConfigError
from megaft.config.deepspeed_json import resolve
from megaft.config.train import OptimConfig

BATCH = {"train_batch_size": 16}


def resolved(blocks, optim=None, has_cuda=True):
    return resolve({**BATCH, **blocks}, world_size=1, optim=OptimConfig(**(optim or {})), has_cuda=has_cuda)


def zero(**keys):
    return {"zero_optimization": keys}


REFUSALS = [
    ({"optimizer": {"type": "Lamb"}}, "use one of Adam, AdamW, FusedAdam, SGD"),
    ({"optimizer": {"params": {"lr": 1}}}, "optimizer.type is null"),
    ({"optimizer": {"type": "AdamW", "params": {"max_grad_norm": 1}}}, "optimizer.params.max_grad_norm is not"),
    ({"optimizer": {"type": "AdamW", "params": {"adam_w_mode": False}}}, "adam_w_mode is false"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": "3e-4"}}}, "params.lr is"),
    ({"optimizer": {"type": "AdamW", "params": {"lr": -1}}}, "learning-rate is -1"),
    ({"optimizer": {"type": "AdamW", "params": {"betas": 0.9}}}, "a list of two numbers"),
    ({"scheduler": {"type": "OneCycle"}}, "use one of WarmupLR, WarmupDecayLR, WarmupCosineLR"),
    ({"scheduler": {"type": "WarmupLR", "params": {}}}, 'warmup_type is "log"; that, DeepSpeed\'s default, is not'),
    ({"scheduler": {"type": "WarmupCosineLR", "params": {"warmup_type": "linear"}}}, "params.total_num_steps"),
    (
        {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_num_steps": 10.5}}},
        "warmup_num_steps is 10.5",
    ),
    (
        {
            "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
            "scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_max_lr": 2e-3}},
        },
        "warmup_max_lr is 0.002; but optimizer.params.lr is 0.001",
    ),
]


@pytest.mark.parametrize(("blocks", "said"), REFUSALS, ids=[said[:40] for _, said in REFUSALS])
def test_blocks_that_are_not_offered(blocks, said):
    with pytest.raises(ConfigError, match=said):
        resolved(blocks)


@pytest.mark.parametrize(
    ("blocks", "optim", "expected"),
    [
        pytest.param(
            {
                "optimizer": {
                    "type": "AdamW",
                    "params": {"lr": 3e-4, "betas": [0.8, 0.95], "eps": 1e-6, "weight_decay": 0.1},
                }
            },
            {},
            {"name": "adamw", "learning_rate": 3e-4, "beta1": 0.8, "beta2": 0.95, "epsilon": 1e-6, "weight_decay": 0.1},
            id="AdamW",
        ),
        pytest.param(
            {"optimizer": {"type": "adam"}}, {}, {"learning_rate": 1e-3, "weight_decay": 0.0}, id="DeepSpeed's defaults"
        ),
        pytest.param(
            {"optimizer": {"type": "Adam"}},
            {"weight_decay": 0.2},
            {"learning_rate": 1e-3, "weight_decay": 0.2},
            id="a flag before DeepSpeed's default",
        ),
        pytest.param(
            {"optimizer": {"type": "SGD", "params": {"lr": 0.1, "momentum": 0.9}}},
            {"learning_rate": 0.1},
            {"name": "sgd", "learning_rate": 0.1, "momentum": 0.9, "weight_decay": 0.0},
            id="SGD, said twice alike",
        ),
        pytest.param(
            {"scheduler": {"type": "WarmupLR", "params": {"warmup_type": "linear", "warmup_max_lr": 2e-4}}},
            {},
            {"schedule": "constant", "warmup_steps": 1000, "learning_rate": 2e-4},
            id="WarmupLR",
        ),
        pytest.param(
            {
                "scheduler": {
                    "type": "WarmupDecayLR",
                    "params": {
                        "warmup_type": "linear",
                        "warmup_num_steps": 10,
                        "total_num_steps": 500,
                        "warmup_max_lr": 2e-4,
                    },
                }
            },
            {},
            {"schedule": "linear", "warmup_steps": 10, "learning_rate": 2e-4, "final_fraction": 0.0},
            id="WarmupDecayLR",
        ),
        pytest.param(
            {
                "optimizer": {"type": "FusedAdam", "params": {"lr": 1e-5}},
                "scheduler": {
                    "type": "WarmupCosineLR",
                    "params": {
                        "warmup_type": "linear",
                        "warmup_num_steps": 5,
                        "total_num_steps": 500,
                        "cos_min_ratio": 0,
                    },
                },
            },
            {},
            {"schedule": "cosine", "warmup_steps": 5, "learning_rate": 1e-5, "final_fraction": 0},
            id="WarmupCosineLR",
        ),
    ],
)
def test_blocks_become_settings(blocks, optim, expected):
    ours = resolved(blocks, optim)
    assert {name: getattr(ours.optim, name) for name in expected} == expected
    assert not {"optimizer", "scheduler"} & ours.engine_config.keys()
    assert "run by megaft" in ours.notes[0]
    has_length = "total_num_steps" in blocks.get("scheduler", {}).get("params", {})
    assert ours.total_num_steps == (500 if has_length else None)


@pytest.mark.parametrize(
    ("optim", "said"),
    [
        ({"learning_rate": 5e-4}, "optimizer.params.lr is 0.0003; but --optim.learning-rate is 0.0005"),
        ({"name": "adafactor"}, 'optimizer.type is "adamw"; but --optim.name is adafactor'),
    ],
)
def test_said_twice_with_different_values(optim, said):
    with pytest.raises(ConfigError, match=said):
        resolved({"optimizer": {"type": "AdamW", "params": {"lr": 3e-4}}}, optim)


@pytest.mark.parametrize(
    ("extra", "optim", "has_cuda", "said"),
    [
        pytest.param(
            zero(stage=1), {"name": "adafactor"}, True, "--optim.name is adafactor", id="adafactor under ZeRO"
        ),
        pytest.param({}, {"name": "apex-adamw"}, False, "--optim.name is apex-adamw", id="apex on a CPU"),
        pytest.param(
            zero(stage=2, offload_optimizer={"device": "cpu"}),
            {"name": "apex-adamw"},
            True,
            "--optim.name is apex-adamw",
            id="apex with offload",
        ),
        pytest.param({}, {"momentum": 0.9}, True, "momentum is 0.9, which has no effect on adamw", id="momentum"),
        pytest.param({}, {"name": "sgd", "beta2": 0.5}, True, "beta2 is 0.5, which has no effect on sgd", id="beta"),
        pytest.param(
            {},
            {"schedule": "constant", "final_fraction": 0.5},
            True,
            "final-fraction is 0.5, which has no effect on constant",
            id="the end of a constant",
        ),
    ],
)
def test_settings_that_do_not_go_together(extra, optim, has_cuda, said):
    with pytest.raises(ConfigError, match=said):
        resolved(extra, optim, has_cuda)


def test_adafactor_where_it_is_itself():
    assert resolved(zero(stage=0), {"name": "adafactor"}).optim.name == "adafactor"
