import pytest

from megaft.base.errors import ConfigError
from megaft.config.deepspeed_json import resolve
from megaft.config.train import OptimConfig

KEYS = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")


@pytest.mark.parametrize(
    ("given", "world_size", "expected"),  # as KEYS, for a run of global batch 24
    [
        pytest.param((24, 4, None), 2, (24, 4, 3), id="it still divides"),
        pytest.param((24, 4, None), 4, (24, 3, 2), id="the largest that divides"),
        pytest.param((24, 4, 3), 1, (24, 4, 6), id="accumulation follows"),
        pytest.param((24, 4, 3), 8, (24, 3, 1), id="both follow"),
        pytest.param((24, None, 3), 4, (24, 2, 3), id="micro-batch not given"),
        pytest.param((None, 4, 3), 4, (24, 3, 2), id="the batch is the checkpoint's"),
        pytest.param((None, 4, None), 24, (24, 1, 1), id="a sample a rank"),
        pytest.param(("auto", 5, "auto"), 1, (24, 4, 6), id="auto"),
    ],
)
def test_a_run_that_goes_on_cuts_its_batch_for_the_ranks_there_are(given, world_size, expected):
    raw = {key: value for key, value in zip(KEYS, given, strict=True) if value is not None}
    resolved = resolve(raw, world_size=world_size, optim=OptimConfig(), has_cuda=False, resumed_batch_size=24)
    assert tuple(resolved.engine_config[key] for key in KEYS) == expected
    fell = given[1] is not None and given[1] != expected[1]
    assert any("train_micro_batch_size_per_gpu" in note for note in resolved.notes) == fell


def test_ranks_that_do_not_divide_the_batch_are_refused():
    with pytest.raises(ConfigError, match=r"train_batch_size is 24, .* 5 data-parallel ranks"):
        resolve({"train_batch_size": 24}, world_size=5, optim=OptimConfig(), has_cuda=False, resumed_batch_size=24)
