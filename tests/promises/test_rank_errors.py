"""An error on one rank at the start, such as a missing file: every rank ends with its message and exit code."""

import json
import os
import shutil
from datetime import timedelta
from pathlib import Path

import pytest

from megaft.base.errors import ConfigError, DataError, UserError
from megaft.base.redaction import without_folders

pytestmark = pytest.mark.slow


def refuse(*_, **__):
    raise ConfigError("a setting is wrong on this node.")


EMPTY = "an empty folder"
"""Broken model folder of one rank, without a model's files."""
OTHER_WEIGHTS, OTHER_CONFIG = "a copy with other weights", "a copy with another config.json"
"""Model folders of one rank that differ from those of the others."""
# ZeRO stage; the flag that names the model; what is broken (or the flag that is given), and on which rank; and what
# that rank says
CASES = {
    "another seed": (1, "path", "--run.seed=7", 1, ConfigError, "--run.seed is 7 here"),
    "another batch": (1, "path", "--deepspeed_config={}", 1, ConfigError, "the content of --deepspeed_config is {"),
    "other weights": (1, "path", OTHER_WEIGHTS, 1, ConfigError, "the weights of --model.path"),
    "other weights, stage 3": (3, "path", OTHER_WEIGHTS, 1, ConfigError, "the weights of --model.path"),
    "another config, stage 3": (3, "path", OTHER_CONFIG, 1, ConfigError, "the config.json of --model.path"),
    "no weights": (1, "path", EMPTY, 1, DataError, "has no weights"),
    "no weights, stage 3": (3, "path", EMPTY, 1, DataError, "has no weights"),
    "no weights on the main rank, stage 3": (3, "path", EMPTY, 0, DataError, "has no weights"),
    "no config.json": (1, "from-scratch", EMPTY, 1, DataError, "invalid model config"),
    "no config.json, stage 3": (3, "from-scratch", EMPTY, 1, DataError, "invalid model config"),
    "no such precision": (1, "path", "build.require_supported", 1, ConfigError, "a setting is wrong"),
    "a model that looks ahead": (1, "path", "model.trials.require_language_model", 1, ConfigError, "a setting is"),
    "no validation text": (1, "path", "build.Validation", 1, ConfigError, "a setting is wrong"),
    "no such optimizer": (1, "path", "engine.build_optimizer", 1, ConfigError, "a setting is wrong"),
    "a disk that is full": (1, "path", "start.write_config", 0, ConfigError, "a setting is wrong"),
}


# What rank 1 lacks of the model, and whether its weights are partitioned
EVALUATIONS = {
    "evaluation: no tokenizer": ("tokenizer.json", False),
    "evaluation: no weights": ("model.safetensors", False),
    "evaluation: no weights, partitioned": ("model.safetensors", True),
}


def with_other_weights(run_dir, model):
    from safetensors.torch import load_file, save_file

    folder = Path(shutil.copytree(model, f"{run_dir} model"))
    weights = load_file(folder / "model.safetensors")
    weights["transformer.ln_f.bias"][-1] += 1
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_other_config(run_dir, model):
    folder = Path(shutil.copytree(model, f"{run_dir} model"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_epsilon": 1e-3}))
    return folder


BROKEN_MODELS = {
    EMPTY: lambda run_dir, _: run_dir.parent,
    OTHER_WEIGHTS: with_other_weights,
    OTHER_CONFIG: with_other_config,
}


def train_all(folder, model, texts):
    """Return the exit code and message of every case on this rank."""
    from megaft.base import parallel

    topology = parallel.discover(os.environ)
    return {name: failure_of(folder / name, model, texts, topology, *case[:4]) for name, case in CASES.items()}


def failure_of(run_dir, model, texts, topology, stage, flag, broken, culprit):
    from megaft.base import parallel
    from megaft.config.train import parse_train
    from megaft.train import run

    settings = run_dir.parent / f"stage-{stage}-{topology.rank}.json"
    settings.write_text(json.dumps({"train_batch_size": 2, "zero_optimization": {"stage": stage}}))
    if broken in BROKEN_MODELS and topology.rank == culprit:
        model = BROKEN_MODELS[broken](run_dir, model)
    flags = [f"--deepspeed_config={settings}", f"--model.{flag}={model}", f"--data.tokenizer={texts.tokenizer}"]
    flags += [f"--data.train={texts.train}", f"--data.valid={texts.valid}", "--data.context-length=32"]
    if broken.startswith("--") and topology.rank == culprit:
        other = run_dir.parent / "other.json"
        other.write_text(json.dumps({"train_batch_size": 4, "zero_optimization": {"stage": stage}}))
        flags.append(broken.format(other))
    with pytest.MonkeyPatch.context() as patch:
        if broken not in BROKEN_MODELS and not broken.startswith("--") and topology.rank == culprit:
            patch.setattr(f"megaft.run.{broken}", refuse)
        try:
            run(parse_train([*flags, f"--run.dir={run_dir}", "--run.max-steps=1"]), topology)
        except UserError as error:
            return error.exit_code, str(error)
        finally:
            parallel.barrier()  # the main rank has written why the run ended
    return 0, ""


def evaluate_all(folder, model, texts):
    """Return the exit code and message of every evaluation on this rank."""
    from evaluate_zero_shot import __main__ as program
    from evaluate_zero_shot.config import parse
    from megaft.base import parallel

    topology, seen = parallel.discover(os.environ), {}
    for name, (part, is_partitioned) in EVALUATIONS.items():
        source = folder / f"{name} {topology.rank}"
        shutil.copytree(model, source)
        if topology.rank == 1:
            (source / part).unlink()
        flags = [f"--model={source}", "--task=text", f"--data={texts.valid}", f"--output={folder / name}"]
        with pytest.raises(UserError) as error:
            program.run(parse([*flags, *(["--partition"] if is_partitioned else [])]), topology)
        seen[name] = error.value.exit_code, str(error.value)
    return seen


def all_cases(*arguments):
    from megaft.base import parallel

    parallel.join(parallel.discover(os.environ), timedelta(seconds=60))
    try:
        return train_all(*arguments) | evaluate_all(*arguments)
    finally:
        parallel.leave()


class Texts:
    def __init__(self, tokenizer, texts):
        self.tokenizer, (self.train, self.valid) = tokenizer, texts


@pytest.fixture(scope="module")
def failures(run_ranks, tmp_path_factory, toy_model, toy_texts):
    folder = tmp_path_factory.mktemp("runs")
    return folder, run_ranks(2, all_cases, folder, toy_model, Texts(toy_model, toy_texts))


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_end_with_what_one_found(failures, name):
    folder, found = failures
    *_, culprit, kind, said = CASES[name]
    code, message = found[culprit][name]
    assert code == kind.exit_code
    assert said in message
    assert found[1 - culprit][name] == (code, f"rank {culprit}: {message}")
    ended = json.loads((folder / name / "ended.json").read_text())
    assert ended == {"exit_code": code, "reason": without_folders(found[0][name][1])}


@pytest.mark.parametrize("name", EVALUATIONS)
def test_all_ranks_end_an_evaluation_with_what_one_found(failures, name):
    _, (main, other) = failures
    assert other[name][0] == DataError.exit_code
    assert main[name] == (DataError.exit_code, f"rank 1: {other[name][1]}")
