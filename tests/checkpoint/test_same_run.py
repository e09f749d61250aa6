"""A checkpoint is resumed by the run that it belongs to."""

import json
from dataclasses import asdict, fields, replace

import pytest
from plain_engine import IDENTITY

from megaft.base.errors import CheckpointError
from megaft.checkpoint import resume
from megaft.checkpoint.run_state import ADDED_LATER, Identity
from megaft.config.identity import CHANGEABLE, SETTINGS


def test_another_run_is_refused_unless_the_change_is_allowed(tmp_path, capsys):
    folder = tmp_path / "step-00000001"
    saved = json.loads(json.dumps(asdict(IDENTITY)))
    now = saved | {"seed": 1, "data": "e", "optim": saved["optim"] | {"learning_rate": 2e-3}}
    with pytest.raises(CheckpointError) as refused:
        resume.require_same_run(folder, saved, now, ())
    message = str(refused.value)
    assert (
        "--run.seed: 0 in the checkpoint, 1 in this run; --data.train: d in the checkpoint, e in this run; " in message
    )
    assert "--optim.learning-rate: 0.001 in the checkpoint, 0.002 in this run)" in message
    assert "--checkpoint.allow-changed data optim" in message
    with pytest.raises(CheckpointError, match=r"\(--run.seed: 0 in the checkpoint, 1 in this run\)"):
        resume.require_same_run(folder, saved, now, ("data", "optim"))
    resume.require_same_run(folder, saved, now, ("data", "optim", "seed"))
    assert "--run.seed: 0 in the checkpoint, 1 in this run; --data.train" in capsys.readouterr().out
    resume.require_same_run(folder, saved, saved, ())
    assert capsys.readouterr().out == ""


def test_an_older_checkpoint_without_later_fields_is_resumed(tmp_path):
    now = json.loads(json.dumps(asdict(FULL_IDENTITY)))
    old = {name: value for name, value in now.items() if name not in ADDED_LATER}
    resume.require_same_run(tmp_path, old, now, ())
    resume.require_same_run(tmp_path, now | {"model_config": {"n_head": 2}}, now, ())
    with pytest.raises(CheckpointError, match=r"--run\.seed"):
        resume.require_same_run(tmp_path, old | {"seed": 1}, now, ())


FULL_IDENTITY = replace(
    IDENTITY,
    gradient_clipping=1.0,
    precision="float32",
    lora={"rank": 4, "alpha": 16, "dropout": 0.0, "target_modules": "c_attn"},
    model_config={"n_head": 2, "activation_function": "gelu_new"},
    model_weights="a",
)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"gradient_clipping": 0.5}, r"gradient_clipping of --deepspeed_config: 1.0 in .*, 0.5 in this run"),
        ({"precision": "bfloat16"}, r"--deepspeed_config: float32 in .*, bfloat16 in this run"),
        ({"lora": FULL_IDENTITY.lora | {"alpha": 32}}, r"--lora.alpha: 16 in .*, 32 in this run"),
        ({"lora": {"rank": 0}}, r"--lora.rank: 4 in .*, 0 in this run"),
        ({"lora": FULL_IDENTITY.lora | {"target_modules": "wte"}}, r"--lora.target-modules: c_attn in .*, wte in"),
        ({"model_config": {"n_head": 4}}, r"--model.path .*n_head of config.json: 2 in .*, 4 in this run"),
        ({"model_weights": "b"}, r"--model.path .*stored weights: a in .*, b in this run"),
        ({"schedule_steps": 9}, r"--run.max-steps .*: None in .*, 9 in this run"),
    ],
)
def test_each_setting_of_another_run_is_named_by_its_flag(tmp_path, change, said):
    saved, now = (
        json.loads(json.dumps(asdict(identity))) for identity in (FULL_IDENTITY, replace(FULL_IDENTITY, **change))
    )
    with pytest.raises(CheckpointError, match=said):
        resume.require_same_run(tmp_path, saved, now, ())
    (field,) = change
    if field in CHANGEABLE:
        resume.require_same_run(tmp_path, saved, now, (field,))


def test_every_field_of_the_identity_has_a_setting():
    assert {field.name for field in fields(Identity)} - {"names"} == SETTINGS.keys()
