"""torch's global flags, each case in its own process because some are read once."""

import contextlib
import inspect
import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megaft.base.torch_flags import DETERMINISTIC_ENVIRONMENT
from megaft.models.hugging_face import NatsModel

PROGRAM = """
import json, os, torch
import torch._inductor.config
from megaft.base import parallel
from megaft.base.environment import environment
from megaft.base.torch_flags import set_before_cuda

def program(topology):
    set_before_cuda({is_deterministic}, {size})
    print(json.dumps({{
        "matmul": torch.backends.cuda.matmul.allow_tf32,
        "cudnn": torch.backends.cudnn.allow_tf32,
        "warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills": torch.utils.deterministic.fill_uninitialized_memory,
        "compiler": torch._inductor.config.deterministic,
        "variables": dict(os.environ),
        "recorded": environment(),
    }}))
    return 0

raise SystemExit(parallel.exit_code_on_ranks(program))
"""


def flags(is_deterministic, size, **variables):
    program = PROGRAM.format(is_deterministic=is_deterministic, size=size)
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_fp32_is_fp32_in_a_container_that_switches_tf32_on():
    found = flags(False, 1, TORCH_ALLOW_TF32_CUBLAS_OVERRIDE="1", NVIDIA_TF32_OVERRIDE="1")
    assert (found["matmul"], found["cudnn"]) == (False, False)
    assert found["variables"]["NVIDIA_TF32_OVERRIDE"] == "0"
    assert found["recorded"]["float32_matmul_precision"] == "highest"
    assert found["recorded"]["is_deterministic"] is False
    assert "CUDA_DEVICE_MAX_CONNECTIONS" not in found["variables"]


def flags_on_rank(is_deterministic, size, variables):
    """Return what the program prints in a process that has imported torch; its variables are read at the call."""
    os.environ.update(variables)
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit, match="0"):
        exec(PROGRAM.format(is_deterministic=is_deterministic, size=size), {})
    return json.loads(out.getvalue())


@pytest.mark.slow
def test_what_deterministic_switches_on(run_ranks):
    (found,) = run_ranks(1, flags_on_rank, True, 2, {"NCCL_ALGO": "Tree"})
    assert found["recorded"]["is_deterministic"] is True
    assert (found["warns"], found["fills"], found["compiler"]) == (False, False, True)
    assert found["variables"].items() >= DETERMINISTIC_ENVIRONMENT.items()
    assert found["variables"]["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"


class Operations(TorchDispatchMode):
    """Notes the operations that run; those of whole numbers alone add up to the same in any order."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if any(isinstance(one, torch.Tensor) and one.is_floating_point() for one in (*args, result)):
            self.names.add(func.overloadpacket._qualified_op_name.partition("::")[2])
        return result


def without_deterministic_kernel():
    """The operations that torch's documentation says raise in its deterministic mode, as ATen calls them."""
    page = inspect.getdoc(torch.use_deterministic_algorithms)
    assert page
    raising = page.partition("operations will throw a")[2].partition("In addition")[0]
    names = re.findall(r":(?:class|func):`torch\.(?:\w+\.)*(\w+)`", raising)
    return {re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower() for name in names} | {"nll_loss"}


def test_no_operation_of_training_lacks_a_deterministic_kernel(toy_model):
    from transformers import AutoModelForCausalLM

    model = NatsModel(AutoModelForCausalLM.from_pretrained(toy_model), "chunked").train()
    ids = torch.arange(16).reshape(2, 8)
    with Operations() as seen:
        model(ids, ids.clone()).backward()
    raising = without_deterministic_kernel()
    assert {"nll_loss", "cumsum", "histc", "median"} <= raising
    found = {name for name in seen.names for one in raising if name.removeprefix("_").startswith(one.rstrip("_"))}
    assert {"embedding_dense_backward", "scatter_add_"} <= seen.names, "what ran is seen"
    assert found == set()
