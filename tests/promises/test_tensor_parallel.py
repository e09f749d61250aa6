"""A run resumed with another tensor-parallel size, ZeRO stage or backend after every stop is the same run."""

import json
import shutil

import pytest
import torch
import toy

from megaft.base.errors import ConfigError
from megaft.base.topology import discover
from megaft.config.train import parse_train
from megaft.models.hugging_face import NatsModel
from megaft.run.plan import plan_run
from megaft.weights import canonical
from megaft.weights import manifest as manifest_module
from megaft.weights.loading.pretrained import load_language_model
from megaft.weights.megatron_folder import MANIFEST
from megaft.weights.parameters import load_config, shapes_of

pytestmark = pytest.mark.slow

TOLERANCE = 1e-5
# ranks, tensor-parallel size (0: transformers' modules), ZeRO stage, steps in all after it
HOPS = [(2, 2, 1, 1), (4, 2, 3, 2), (4, 4, 2, 3), (2, 0, 3, 4), (1, 1, 0, 5)]
STEPS = HOPS[-1][-1]


def train_hops(folder, common, hops):
    toy.train_in_turn(
        (
            folder / f"{name}-{stage}-{size}-{steps}.json",
            {
                "train_batch_size": 8,
                "train_micro_batch_size_per_gpu": 2,
                "gradient_clipping": 0.5,
                "zero_optimization": {"stage": stage}
                | ({"stage3_param_persistence_threshold": 0} if stage == 3 else {}),
            },
            [
                *common,
                f"--run.dir={folder / name}",
                f"--run.max-steps={steps}",
                *(["--model.backend=megatron"] if size else []),
                *(["--model.activation-checkpointing"] if stage == 3 else []),
                f"--parallel.tensor-parallel-size={max(1, size)}",
            ],
        )
        for name, _, size, stage, steps in hops
    )


@pytest.fixture(scope="module")
def folder(run_ranks, toy_model, toy_texts, tmp_path_factory):
    train, valid = toy_texts
    common = [
        f"--model.path={toy_model}",
        f"--data.train={train}",
        f"--data.valid={valid}",
        "--data.context-length=32",
        "--optim.schedule=constant",
        "--optim.learning-rate=1e-3",
        "--run.export=last",
    ]
    folder = tmp_path_factory.mktemp("hops")
    run_ranks(1, train_hops, folder, common, [("alone", 1, 0, 0, STEPS), ("cut-1", 1, 1, 0, STEPS)])
    for world_size, *hop in HOPS:
        also = [("cut-2", 2, 2, 0, STEPS)] if world_size == 2 and hop[0] == 2 else []
        run_ranks(world_size, train_hops, folder, common, [("hops", world_size, *hop), *also])
    return folder


def rows(folder, name, quantity):
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return {row["step"]: row[quantity] for row in lines if quantity in row}


@pytest.mark.parametrize("quantity", ["loss", "grad_norm"])
@pytest.mark.parametrize("name", ["hops", "cut-1", "cut-2"])
def test_every_step_is_that_of_one_rank(folder, name, quantity):
    expected, found = rows(folder, "alone", quantity), rows(folder, name, quantity)
    assert expected.keys() == found.keys() == {*range(1, STEPS + 1)}
    assert expected[STEPS] != expected[1]
    for step, value in expected.items():
        assert found[step] == pytest.approx(value, rel=TOLERANCE)


@pytest.mark.parametrize("kind", ["weight", "exp_avg", "exp_avg_sq"])
@pytest.mark.parametrize("name", ["hops", "cut-1", "cut-2"])
def test_weights_and_moments_are_those_of_one_rank(folder, toy_model, name, kind):
    config = load_config(str(toy_model))

    expected, found = (
        canonical.transformers_view(manifest_module.folder_of(folder / run, STEPS), config) for run in ("alone", name)
    )
    for parameter in shapes_of(config):
        difference = (found.read(parameter, kind) - expected.read(parameter, kind)).abs().max()
        assert difference <= TOLERANCE


@pytest.mark.parametrize("name", ["cut-1", "cut-2", "hops"])
def test_validation_and_the_export_are_those_of_one_rank(folder, name):
    expected = rows(folder, "alone", "validation")
    found = rows(folder, name, "validation")
    assert expected[0]["nats"] == pytest.approx(found[0]["nats"], rel=1e-6)
    assert expected[STEPS]["nats"] == pytest.approx(found[STEPS]["nats"], rel=1e-6)
    tokens = torch.arange(3, 64).unsqueeze(0)
    exported = [NatsModel(load_language_model(str(folder / run / "export"))).eval() for run in ("alone", name)]
    first, second = (model(tokens[:, :-1], tokens[:, 1:].contiguous()).item() for model in exported)
    assert first == pytest.approx(second, rel=1e-6)


@pytest.mark.parametrize("name", ["cut-1", "cut-2"])
def test_an_export_has_the_files_of_one_of_transformers(folder, name):
    expected, found = ({path.name for path in (folder / run / "export").iterdir()} for run in ("alone", name))
    assert expected == found


def test_a_checkpoint_says_how_it_is_cut(folder):
    manifest = manifest_module.read_manifest(manifest_module.folder_of(folder / "cut-2", STEPS))
    assert (manifest["backend"], manifest["tensor_parallel_size"], manifest["world_size"]) == ("megatron", 2, 2)


REFUSED = {
    "adafactor": (["--model.backend=megatron", "--optim.name=adafactor"], "optim.name is adafactor"),
    "a converted folder": ([], "model.path is .*--model.backend megatron"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_backend_cannot_do_is_refused_before_ranks_join(tmp_path, toy_model, toy_texts, case):
    flags, message = REFUSED[case]
    model, settings = tmp_path / "model", tmp_path / "deepspeed.json"
    shutil.copytree(toy_model, model)
    if not flags:
        (model / MANIFEST).write_text("{}")
    settings.write_text(json.dumps({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}))
    given = {"deepspeed_config": settings, "model.path": model, "data.train": toy_texts[0], "run.dir": tmp_path / "run"}
    config = parse_train([*(f"--{name}={value}" for name, value in given.items()), "--run.max-steps=1", *flags])
    with pytest.raises(ConfigError, match=message):
        plan_run(config, discover({}), has_cuda=False)
