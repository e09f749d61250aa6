"""An error on one rank in the middle of a run: every rank ends with its message and exit code."""

import errno
import json
import os
import signal
import sys

import pytest
from fork_server import CONTEXT

from megaft.base.errors import DataError

pytestmark = pytest.mark.slow
ENOUGH = 300
"""Timeout that ends a hang, even on a busy machine."""


def fail_at(number, error):
    """Return a wrapper of a function whose `number`-th call raises instead."""

    def patched(plain):
        calls = []

        def call(*args, **kwargs):
            calls.append(args)
            if len(calls) == number:
                if isinstance(error, signal.Signals):
                    os.kill(os.getpid(), error)
                raise error
            return plain(*args, **kwargs)

        return call

    return patched


BROKEN_DISK = OSError(errno.EIO, "Input/output error")
FILL = "megaft.models.partitioned._load_state_dict_into_zero3_model"
BATCHES = "megaft.data.batches.micro_batches"
# ZeRO stage; the rank that fails, where and at which call of it, with what; the code and reason of the others
CASES = {
    "data cannot be read in the second step": (1, 1, BATCHES, 2, BROKEN_DISK, 75, "(rank 1: OSError: [Errno 5] "),
    "a sample is wrong": (0, 1, BATCHES, 2, DataError("token 7 is 99."), 3, "rank 1: token 7 is 99."),
    "the main rank's data": (1, 0, BATCHES, 2, BROKEN_DISK, 75, "OSError: [Errno 5] Input/output error"),
    "weights, filled in parts": (3, 0, FILL, 1, BROKEN_DISK, 3, "Input/output error"),
    "a rank is killed while weights are filled": (3, 1, FILL, 1, signal.SIGKILL, 75, "lost its peers"),
}


def train(rank, port, case, flags):
    from megaft.base import exit_code, heartbeat, parallel
    from megaft.config.train import parse_train
    from megaft.train import run

    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    os.environ.update(MASTER_PORT=str(port))
    heartbeat.GRACE_SECONDS, exit_code.SECONDS_FOR_MAIN = 1.0, 2.5
    _, culprit, place, number, error, *_ = case
    with pytest.MonkeyPatch.context() as patch:
        if rank == culprit:
            module, _, name = place.rpartition(".")
            __import__(module)
            patch.setattr(place, fail_at(number, error)(getattr(sys.modules[module], name)))
        sys.exit(parallel.exit_code_on_ranks(lambda topology: run(parse_train(flags), topology)))


@pytest.mark.parametrize("name", CASES)
def test_all_ranks_end_as_the_one_that_failed(name, tmp_path, toy_model, toy_texts):
    from megaft.base.parallel import free_port

    stage, culprit, *_, error, code, reason = CASES[name]
    settings = tmp_path / "deepspeed.json"
    settings.write_text(json.dumps({"train_batch_size": 2, "zero_optimization": {"stage": stage}}))
    flags = [f"--deepspeed_config={settings}", f"--model.path={toy_model}", f"--data.tokenizer={toy_model}"]
    flags += [f"--data.train={toy_texts[0]}", "--data.context-length=32", f"--run.dir={tmp_path / 'run'}"]
    port = free_port()
    arguments = [(rank, port, CASES[name], [*flags, "--run.max-steps=4", "--run.export=none"]) for rank in (0, 1)]
    processes = [CONTEXT.Process(target=train, args=each) for each in arguments]
    for process in processes:
        process.start()
    for process in processes:
        process.join(ENOUGH)
        process.kill()
    codes = [code, code]
    if isinstance(error, signal.Signals):
        codes[culprit] = -error
    elif culprit == 0 and code == 75:
        codes[culprit] = 1  # Python's own, with the traceback
    assert [process.exitcode for process in processes] == codes
    ended = json.loads((tmp_path / "run" / "ended.json").read_text())
    assert ended["exit_code"] == code
    assert reason in ended["reason"]
