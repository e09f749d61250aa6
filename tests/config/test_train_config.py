import pytest

from megaft.base.errors import ConfigError
from megaft.config.train import parse_train

BASE = {
    "--deepspeed-config": "a.json",
    "--model.path": "m",
    "--data.train": "t",
    "--run.dir": "r",
    "--run.max-steps": "2",
}


def parse(**flags):
    merged = BASE | {f"--{name.replace('__', '.').replace('_', '-')}": value for name, value in flags.items()}
    return parse_train([part for name, value in merged.items() if value is not None for part in (name, value)])


def test_the_flag_is_the_field():
    config = parse(optim__learning_rate="3e-4", data__context_length="64")
    assert (config.optim.learning_rate, config.data.context_length) == (3e-4, 64)


def test_the_launchers_flag_is_accepted():
    arguments = [part for pair in BASE.items() for part in pair]
    assert parse_train(["--local_rank=3", *arguments]) == parse_train(arguments)


def test_underscores_are_accepted():
    arguments = [part for name, value in BASE.items() for part in (name.replace("-config", "_config"), value)]
    assert parse_train(arguments).deepspeed_config.name == "a.json"


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"model__from_scratch": "c.json"}, "--model.path is"),
        ({"model__path": None}, "--model.path is"),
        ({"model__path": None, "model__from_scratch": "c.json"}, "--data.tokenizer"),
        ({"model__dropout": "1"}, "model.dropout is 1.0"),
        ({"run__epochs": "1"}, "--run.max-steps is"),
        ({"run__max_steps": "0"}, "run.max-steps is 0"),
        ({"run__max_steps": None, "run__epochs": "0"}, "run.epochs is 0.0"),
        ({"checkpoint__keep_last": "0"}, "checkpoint.keep-last is 0"),
        ({"run__patience": "2"}, "--run.patience is 2"),
        ({"run__validate_every": "2"}, "--run.validate-every is 2"),
        ({"eval__stride": "9"}, "--data.valid"),
        ({"data__valid": "v", "eval__stride": "2000"}, "eval.stride is 2000; use 1 to 1024"),
        ({"data__context_length": "1"}, "data.context-length is 1"),
        ({"optim__learning_rate": "nan"}, "optim.learning-rate is nan"),
        ({"optim__learning_rate": "inf"}, "optim.learning-rate is inf"),
        ({"optim__learning_rate": "-1e-4"}, "optim.learning-rate is -0.0001"),
        ({"optim__beta2": "1"}, "optim.beta2 is 1.0"),
        ({"optim__weight_decay": "inf"}, "optim.weight-decay is inf; use a finite number"),
        ({"run__seed": str(2**63)}, "run.seed is 9223372036854775808; use 0 or more and less than 2^63"),
        ({"lora__alpha": "8"}, "lora.rank is 0"),
        ({"lora__rank": "8", "lora__dropout": "1"}, "lora.dropout is 1.0"),
        ({"metrics__peak_flops": "0"}, "metrics.peak-flops is 0.0"),
        ({"metrics__wandb_project": "p"}, "metrics.wandb is off"),
        ({"optim__nmae": "sgd"}, "--optim.nmae"),
        ({"optim__lr": "1e-3"}, "--optim.lr: did you mean --optim.learning-rate?"),
        ({"wd": "0.1"}, "--wd: did you mean --optim.weight-decay?"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_a_user_gets_wrong_is_named(flags, said, capsys):
    with pytest.raises((ConfigError, SystemExit)) as stop:
        parse(**flags)
    # The parser's own mistakes end it, with code 2, after a message in a box.
    assert said in str(stop.value) or (stop.value.code == 2 and said in capsys.readouterr().err)
