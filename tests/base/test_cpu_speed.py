"""Notes on half precision where a CPU has no instructions for it; the measured seconds are given."""

from pathlib import Path

import pytest
import torch

from megaft.base.cpu_speed import notes_on_precision, seconds_of_products
from megaft.commands.doctor.machine import cpu_precision

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize(
    ("bf16", "fp16", "status", "found"),
    [
        pytest.param(0.5, 70.0, "pass", "bf16 is fast, fp16 is 70 times slower than fp32", id="AVX-512 BF16"),
        pytest.param(70.0, 66.0, "warn", "bf16 is 70 times slower", id="neither"),
        pytest.param(1.9, 0.5, "pass", "bf16 is fast, fp16 is fast", id="both"),
    ],
)
def test_the_doctor_compares_half_precision_with_fp32(bf16, fp16, status, found):
    check = cpu_precision({FP32: 1.0, BF16: bf16, FP16: fp16})
    assert check.status == status
    assert found in check.found
    assert bool(check.fix) is (status == "warn")


@pytest.mark.parametrize(
    ("dtype", "stage", "offload", "recipe"),
    [
        pytest.param(BF16, 1, False, "zero1_fp32.json", id="bf16 at stage 1"),
        pytest.param(FP16, 2, False, "zero2_fp32.json", id="fp16 at stage 2"),
        pytest.param(BF16, 2, True, "zero2_fp32_offload.json", id="offloaded at stage 2"),
        pytest.param(BF16, 3, True, "zero3_fp32.json", id="offloaded at stage 3"),
    ],
)
def test_a_slow_run_names_a_recipe_that_is_there(dtype, stage, offload, recipe):
    (note,) = notes_on_precision({FP32: 1e-3, dtype: 12e-3}, dtype, stage, offload)
    assert "12 times slower than fp32" in note
    assert f"ds_configs/{recipe}" in note
    assert (Path(__file__).parents[2] / "ds_configs" / recipe).is_file()
    assert notes_on_precision({FP32: 1e-3, dtype: 1e-3}, dtype, stage, offload) == []


def test_seconds_of_products():
    seconds = seconds_of_products((FP32, BF16))
    assert all(0 < value < 60 for value in seconds.values())
