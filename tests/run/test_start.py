"""A training run's start in its three stages: nothing is read twice, and each stage says what it does."""

import importlib
import json
import os
import sys
from contextlib import redirect_stderr
from io import StringIO

import pytest

pytestmark = pytest.mark.slow


STAGES = ("preparing data", "loading the model", "building the engine", "looking for checkpoints")
READERS = (
    "megaft.data.tokenizer.load_tokenizer",
    "megaft.data.receipt.load_receipt",
    "megaft.config.deepspeed_json.read_deepspeed_json",
)


def calls_of(patch, counted, name):
    """Count the calls of a function, given by its module and name, in every module that has it."""
    module, _, attribute = name.rpartition(".")
    real = getattr(importlib.import_module(module), attribute)

    def call(argument, *more, **options):
        place = f"{attribute} {argument}"
        result = real(argument, *more, **options)
        counted[place] = counted.get(place, 0) + 1
        return result

    for name, loaded in list(sys.modules.items()):
        if name.startswith("megaft.") and getattr(loaded, attribute, None) is real:
            patch.setattr(loaded, attribute, call)


def start_twice(flags):
    """Start and end a run of one step, then continue it; return of each start what was read how often, and said."""
    from megaft import train
    from megaft.base import parallel
    from megaft.config.train import parse_train
    from megaft.run import start  # noqa: F401  # so that all of its modules are patched

    starts = []
    for steps in (1, 2):
        counted, said = {}, StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
            for name in READERS:
                calls_of(patch, counted, name)
            config = parse_train([*flags, f"--run.max-steps={steps}"])
            assert train.run(config, parallel.discover(os.environ)) == 0
        starts.append((counted, said.getvalue()))
    parallel.leave()
    return starts


def test_a_start_reads_each_file_once_and_says_what_it_does(run_ranks, toy_model, toy_texts, tmp_path):
    """A text that the first start prepares, and that the second one finds prepared."""
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}))
    flags = [f"--deepspeed_config={settings}", f"--model.path={toy_model}", f"--run.dir={tmp_path / 'run'}"]
    flags += [f"--data.train={toy_texts[0]}", f"--data.valid={toy_texts[1]}", "--data.context-length=32"]
    flags += ["--optim.schedule=constant", "--run.export=none"]
    (starts,) = run_ranks(1, start_twice, flags)
    prefixes = [str(path.with_suffix("")) for path in sorted((tmp_path / "run" / "data").glob("*.json"))]
    assert len(prefixes) == 2
    expected = {f"load_tokenizer {toy_model}", f"read_deepspeed_json {settings}"}
    expected |= {f"load_receipt {prefix}" for prefix in prefixes}
    assert [counted for counted, _ in starts] == [dict.fromkeys(expected, 1)] * 2
    for _, said in starts:
        stages = [line.partition(":")[0] for line in said.splitlines()]
        assert [stage for stage in stages if stage in STAGES] == list(STAGES)
