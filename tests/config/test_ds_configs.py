import re
from pathlib import Path

import pytest
from deepspeed.runtime import config as deepspeed_config

from megaft.config.deepspeed_json import read_deepspeed_json, resolve
from megaft.config.train import OptimConfig

FOLDER = Path(__file__).parents[2] / "ds_configs"
PATHS = sorted(FOLDER.glob("*.json"))
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


def resolved(path, world_size=1):
    return resolve(read_deepspeed_json(path), world_size=world_size, optim=OptimConfig(), has_cuda=True)


@pytest.mark.parametrize("world_size", [1, 2, 4, 8])
@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_deepspeed_accepts_what_the_file_resolves_to(path, world_size, monkeypatch):
    monkeypatch.setattr(deepspeed_config.dist, "get_rank", lambda: 0)
    monkeypatch.setattr(deepspeed_config.dist, "get_world_size", lambda: world_size)
    ours = resolved(path, world_size)
    theirs = deepspeed_config.DeepSpeedConfig(ours.engine_config)
    assert ours.global_batch_size == resolved(path).global_batch_size, "the batch must not depend on the ranks"
    assert theirs.train_batch_size == ours.global_batch_size
    assert theirs.train_micro_batch_size_per_gpu == ours.micro_batch_size
    assert theirs.gradient_accumulation_steps == ours.gradient_accumulation_steps
    assert theirs.zero_optimization_stage == ours.zero_stage
    assert theirs.bfloat16_config.enabled == (ours.dtype == "bfloat16")
    assert theirs.float16_config.enabled == (ours.dtype == "float16")
    assert theirs.gradient_clipping == ours.gradient_clipping == 1.0
    assert theirs.grad_accum_dtype == "fp32"


@pytest.mark.parametrize("path", [path for path in PATHS if path.stem.startswith("zero")], ids=lambda path: path.stem)
def test_the_name_says_what_it_runs(path):
    stage, precision, offload = re.fullmatch(r"zero(\d)_(fp32|bf16|fp16)(_offload)?", path.stem).groups()
    ours = resolved(path)
    assert (ours.zero_stage, ours.dtype) == (int(stage), DTYPES[precision])
    assert ours.offload_optimizer == bool(offload)


def test_the_table_in_the_readme_is_true():
    rows = re.findall(r"^\| (\S+\.json) \|(.*)\|", (FOLDER / "README.md").read_text(), flags=re.MULTILINE)
    assert sorted(name for name, _ in rows) == [path.name for path in PATHS]
    for name, cells in rows:
        ours = resolved(FOLDER / name)
        where = "CPU" if ours.offload_optimizer else "device"
        expected = [str(ours.zero_stage), ours.dtype, where, str(ours.global_batch_size), str(ours.micro_batch_size)]
        assert [cell.strip() for cell in cells.split("|")][:5] == expected, name
