"""A training run's start in its three stages: nothing is read twice, and each stage says what it does."""

import json
import os

import pytest

pytestmark = pytest.mark.slow


def calls_of(patch, counted, name, key=str):
    """Count the calls of a function, given by its module and name, in every module that has it."""
    import importlib
    import sys

    module, _, attribute = name.rpartition(".")
    real = getattr(importlib.import_module(module), attribute)

    def call(argument, *more, **options):
        place = f"{attribute} {key(argument)}"
        result = real(argument, *more, **options)
        counted[place] = counted.get(place, 0) + 1
        return result

    for loaded in [loaded for loaded in sys.modules.values() if getattr(loaded, attribute, None) is real]:
        patch.setattr(loaded, attribute, call)


def start_twice(folder, flags):
    """Start and end a run of one step, then continue it; return what was read, how often, by each start."""
    from megaft import train
    from megaft.base import parallel
    from megaft.config.train import parse_train
    from megaft.run import start  # noqa: F401  # so that all of its modules are patched

    counts = []
    for steps in (1, 2):
        with pytest.MonkeyPatch.context() as patch:
            counts.append({})
            calls_of(patch, counts[-1], "megaft.data.tokenizer.load_tokenizer")
            calls_of(patch, counts[-1], "megaft.data.receipt.load_receipt")
            calls_of(patch, counts[-1], "megaft.config.deepspeed_json.read_deepspeed_json")
            config = parse_train([*flags, f"--run.max-steps={steps}"])
            assert train.run(config, parallel.discover(os.environ)) == 0
    parallel.leave()
    return counts


def test_tokenizer_and_receipts_are_read_once(run_ranks, toy_model, toy_texts, tmp_path):
    """A text that the first start prepares, and that the second one finds prepared."""
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"train_batch_size": 1, "train_micro_batch_size_per_gpu": 1}))
    flags = [f"--deepspeed_config={settings}", f"--model.path={toy_model}", f"--run.dir={tmp_path / 'run'}"]
    flags += [f"--data.train={toy_texts[0]}", f"--data.valid={toy_texts[1]}", "--data.context-length=32"]
    flags += ["--optim.schedule=constant", "--run.export=none"]
    (starts,) = run_ranks(1, start_twice, tmp_path, flags)
    prefixes = [str(path.with_suffix("")) for path in sorted((tmp_path / "run" / "data").glob("*.json"))]
    assert len(prefixes) == 2
    expected = {f"load_tokenizer {toy_model}", f"read_deepspeed_json {settings}"}
    expected |= {f"load_receipt {prefix}" for prefix in prefixes}
    assert starts == [dict.fromkeys(expected, 1)] * 2
