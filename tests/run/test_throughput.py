import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch
from fork_server import CONTEXT
from transformers import GPT2Config, GPT2LMHeadModel

from megaft.config.train import MetricsConfig
from megaft.run.throughput import (
    DeviceTimestamp,
    Meter,
    data_sheet_flops,
    flops_per_token,
    measured_flops,
    peak_flops,
    peak_memory_bytes,
)

CPU = torch.device("cpu")


def test_flops_of_gpt2_xl():
    # By hand: 6 * 1,557,611,200 + 12 * 48 * 1600 * 1024.
    assert flops_per_token(1_557_611_200, 48, 1600, 1024) == 10_289_385_600 == 9_345_667_200 + 943_718_400


@pytest.mark.parametrize(
    ("name", "tera"),  # names as torch.cuda.get_device_name gives them; peaks from NVIDIA's data sheets
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA A10", 125),
        ("NVIDIA A10G", None),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla V100-SXM2-16GB", 125),
        ("Tesla V100-PCIE-16GB", 112),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("Some Card 9000", None),
    ],
)
def test_data_sheets(name, tera):
    assert data_sheet_flops(name) == (None if tera is None else pytest.approx(tera * 1e12))


@pytest.mark.parametrize(
    ("dtype", "capability", "is_known"),
    [
        pytest.param(torch.bfloat16, (9, 0), True, id="bf16 on Hopper"),
        pytest.param(torch.float16, (7, 0), True, id="fp16 on Volta"),
        pytest.param(torch.bfloat16, (7, 0), False, id="Volta has no bf16"),
        pytest.param(torch.float32, (9, 0), False, id="the sheet is for half precision"),
    ],
)
def test_which_peak_is_taken(dtype, capability, is_known, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 PCIe")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr("megaft.run.throughput.measured_flops", lambda device, dtype: 1e12)
    value, source = peak_flops(torch.device("cuda"), dtype)
    assert value == (756e12 if is_known else 1e12)
    assert ("data sheet" if is_known else "measured") in source


def test_the_setting_wins_over_every_other_peak():
    assert peak_flops(CPU, torch.float32, 5e12) == (5e12, "metrics.peak-flops")


def test_measuring_a_cpu_is_plausible():
    assert 1e8 < measured_flops(CPU, torch.float32) < 1e14


def test_rates():
    # By hand: 4000 tokens in 2 s on 4 devices; 500 tokens/s * 6e6 FLOP on a device of 1e10 FLOP/s.
    meter = Meter(device=CPU, num_devices=4, flops_per_token=6e6, peak_flops=1e10, peak_source="")
    rates = meter.rates(tokens=4000, seconds=2.0)
    assert rates["tokens_per_second"] == 2000
    assert rates["tokens_per_second_per_device"] == 500
    assert rates["mfu"] == pytest.approx(0.3)


def test_the_meter_of_a_model():
    config = GPT2Config(n_layer=2, n_embd=8, n_head=2, vocab_size=11, n_positions=16)
    model = GPT2LMHeadModel(config)
    meter = Meter.of(config, model, 16, torch.float32, CPU, MetricsConfig(peak_flops=5e12))
    # By hand: 12 d^2 + 13 d weights a layer, 2 d of the last norm, and the embeddings, tied, of 11 words and 16 places.
    num_parameters = 2 * (12 * 64 + 13 * 8) + 2 * 8 + (11 + 16) * 8
    assert meter.flops_per_token == 6 * num_parameters + 12 * 2 * 8 * 16
    assert (meter.num_devices, meter.peak_flops, meter.peak_source) == (1, 5e12, "metrics.peak-flops")
    assert Meter.of(object(), model, 16, torch.float32, CPU, MetricsConfig(peak_flops=1)).flops_per_token is None


@pytest.mark.parametrize(
    ("flops_per_token", "expected"),
    [
        pytest.param(None, None, id="FLOPs unknown"),
        pytest.param(1e12, 1.0, id="all of the peak"),
        pytest.param(2e12, None, id="more than the peak"),
    ],
)
def test_mfu_is_a_share_or_none(flops_per_token, expected):
    meter = Meter(device=CPU, num_devices=1, flops_per_token=flops_per_token, peak_flops=1e12, peak_source="")
    assert meter.rates(1, 1.0)["mfu"] == expected


def status_bytes(name):
    """Return a size that the kernel gives of this process."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status[name].split()[0]) * 1024


def memory_after_256_mib():
    torch.ones(2**28, dtype=torch.uint8)  # let go at once
    return peak_memory_bytes(CPU), status_bytes("VmHWM"), status_bytes("VmRSS")


@pytest.mark.slow
def test_peak_memory_is_the_most_ever_held():
    with ProcessPoolExecutor(1, mp_context=CONTEXT) as fresh:
        peak, most, now = fresh.submit(memory_after_256_mib).result()
    assert peak == pytest.approx(most, rel=0.01)
    assert peak - now > 2**27


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_marks_measure_the_device_not_the_launch():
    device = torch.device("cuda")
    matrix = torch.ones(8192, 8192, device=device, dtype=torch.bfloat16)
    torch.matmul(matrix, matrix)
    torch.cuda.synchronize()
    before, begin = DeviceTimestamp(device), time.perf_counter()
    for _ in range(20):
        torch.matmul(matrix, matrix)
    after, launching = DeviceTimestamp(device), time.perf_counter() - begin
    seconds = after.seconds_since(before)
    assert seconds > 2 * launching
    assert 2 * 8192**3 * 20 / seconds < 1.1 * peak_flops(device, torch.bfloat16)[0]
