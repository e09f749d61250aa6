"""Half precision on CPUs with and without fast instructions for it."""

from pathlib import Path

import pytest
import torch

from megaft.base import half_precision
from megaft.base.half_precision import NAMES, is_slow_on_cpu, megatron_note, product_dtype
from megaft.commands.doctor.machine import cpu_precision
from megaft.run.throughput import peak_flops

BF16, FP16, CPU = torch.bfloat16, torch.float16, torch.device("cpu")


@pytest.mark.parametrize(
    ("slow", "found"),
    [
        ((), "bf16 has fast instructions, fp16 has fast instructions"),
        ((FP16,), "bf16 has fast instructions, fp16 is multiplied in fp32"),
        ((BF16, FP16), "bf16 is multiplied in fp32, fp16 is multiplied in fp32"),
    ],
)
def test_the_doctor_says_how_half_precision_is_multiplied(slow, found, monkeypatch):
    monkeypatch.setattr(half_precision, "SLOW_ON_CPU", slow)
    check = cpu_precision()
    assert (check.status, check.found) == ("pass", found)


def test_only_slow_half_precision_on_a_cpu_becomes_fp32(monkeypatch):
    monkeypatch.setattr(half_precision, "SLOW_ON_CPU", (BF16,))
    assert product_dtype(BF16, CPU) is torch.float32
    assert product_dtype(FP16, CPU) is FP16
    assert product_dtype(BF16, torch.device("cuda")) is BF16
    assert product_dtype(torch.float64, CPU) is torch.float64


def test_the_peak_is_that_of_the_products_that_are_computed(monkeypatch):
    monkeypatch.setattr(half_precision, "SLOW_ON_CPU", (BF16,))
    assert "torch.float32 matrices" in peak_flops(CPU, BF16)[1]


def test_without_onednn_half_precision_is_slow(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert all(map(is_slow_on_cpu, NAMES))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_the_note_names_a_configuration_that_is_there(stage):
    recipe = f"ds_configs/zero{stage}_fp32.json"
    assert recipe in megatron_note(BF16, stage)
    assert (Path(__file__).parents[2] / recipe).is_file()
