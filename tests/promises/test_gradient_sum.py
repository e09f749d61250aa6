"""The gradient of a step is the fp32 sum over micro-batches and ranks, in half precision too."""

import copy
import os
from typing import Any

import pytest

WIDTH, ROWS = 16, 3


def tiny_model():
    import torch

    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(WIDTH, 32), torch.nn.GELU(), torch.nn.Linear(32, 1))


def batch(rank, number, dtype):
    import torch

    generator = torch.Generator().manual_seed(100 * rank + number)
    return torch.randn(ROWS, WIDTH, generator=generator).to(dtype)


def errors(cases):
    """Return for each case, a JSON and what is changed of it unseen, the largest error of a gradient.

    It is given as a part of the largest gradient of the same parameter.
    """
    from deepspeed.accelerator import get_accelerator

    from megaft.base import parallel

    parallel.join(parallel.discover(os.environ))
    accelerator = get_accelerator()
    assert accelerator is not None
    accelerator.is_fp16_supported = lambda: True  # slow on a CPU, and right
    found = [_error(*case) for case in cases]
    parallel.leave()
    return found


def _error(raw, changes):
    """Take a step of SGD at rate 1, which moves each fp32 weight by its gradient."""
    import deepspeed
    import torch
    from deepspeed.utils import safe_get_full_fp32_param

    from megaft.base import parallel
    from megaft.config.deepspeed_json import resolve
    from megaft.config.train import OptimConfig
    from megaft.run.engine import add_gradients_in_one_pass

    optim = OptimConfig(name="sgd", learning_rate=1.0, schedule="constant")
    setup = resolve(raw, world_size=parallel.world_size(), optim=optim, has_cuda=False)
    dtype = getattr(torch, setup.dtype)
    model = tiny_model()
    expected = _expected(copy.deepcopy(model).to(dtype), setup.gradient_accumulation_steps, dtype)
    before = [parameter.detach().to(dtype).double() for parameter in model.parameters()]
    sgd = torch.optim.SGD(model.parameters(), lr=1.0)
    engine: Any = deepspeed.initialize(model=model, optimizer=sgd, config=setup.engine_config | changes)[0]
    add_gradients_in_one_pass(engine)
    for number in range(setup.gradient_accumulation_steps):
        loss = engine(batch(parallel.rank(), number, dtype)).float().sum()
        engine.backward(loss * parallel.world_size(), scale_wrt_gas=False)
        engine.step()
    after: list[Any] = [safe_get_full_fp32_param(parameter) for parameter in engine.module.parameters()]
    moved = [old - new.double().view_as(old) for old, new in zip(before, after, strict=True)]
    return max(
        float((ours - wanted).abs().max() / wanted.abs().max()) for ours, wanted in zip(moved, expected, strict=True)
    )


def _expected(model, num_batches, dtype):
    import torch

    from megaft.base import parallel

    sums = [torch.zeros_like(parameter, dtype=torch.float64) for parameter in model.parameters()]
    for rank in range(parallel.world_size()):
        for number in range(num_batches):
            model.zero_grad()
            model(batch(rank, number, dtype)).float().sum().backward()
            for total, parameter in zip(sums, model.parameters(), strict=True):
                total += parameter.grad.double()
    return sums


def json_of(precision, stage, accumulation, **zero):
    return {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        precision: {"enabled": True} | ({"initial_scale_power": 4} if precision == "fp16" else {}),
        "zero_optimization": {"stage": stage} | zero,
    }


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
AT_THE_STEP = json_of("bf16", 1, 2) | {"bf16": {"enabled": True, "immediate_grad_update": False}}
CASES = [
    *((json_of("bf16", stage, 2), {}) for stage in (1, 2, 3)),
    (AT_THE_STEP, {}),
    (json_of("bf16", 2, 2, overlap_comm=True), {}),
    *((json_of("fp16", stage, 2), {}) for stage in (1, 3)),
    *((json_of("bf16", stage, 2, **OFFLOAD), {}) for stage in (2, 3)),
]
AS_DEEPSPEED_HAS_IT = (json_of("bf16", 1, 4), {"communication_data_type": None})


@pytest.mark.slow
def test_gradients_are_summed_in_fp32(run_ranks):
    """fp16 gradients are divided by a loss scale of 16, in fp32: 2e-7 is what a few roundings there may take."""
    found = run_ranks(2, errors, [*CASES, AS_DEEPSPEED_HAS_IT])[0]
    assert max(found[:-1]) < 2e-7
    assert found[-1] > 1e-3, "the measure sees a rounding to bf16"


@pytest.mark.slow
def test_one_ranks_gradients_are_summed_in_fp32_too(run_ranks):
    """If told to exchange bf16, stage 1 rounds even one rank's fp32 sum."""
    exact, rounded = run_ranks(1, errors, [(json_of("bf16", 1, 4), {}), AS_DEEPSPEED_HAS_IT])[0]
    assert exact < 2e-7
    assert rounded > 1e-3
