"""Stand-in for the parts of a DeepSpeed engine that Saver and `load` use; and a save killed half-way."""

import os
import signal
import sys
import threading
from itertools import count

import torch

from megaft.checkpoint.run_state import Identity, RunState
from megaft.checkpoint.saver import Saver
from megaft.config.train import CheckpointConfig
from megaft.models.parameters import parameter_groups

WEIGHT_DECAY = 0.1
IDENTITY = Identity(
    global_batch_size=8,
    seed=0,
    data="d",
    context_length=32,
    sample="stream",
    attend_within_documents=True,
    tokenizer="t",
    model="m",
    dropout=None,
    optim={"weight_decay": WEIGHT_DECAY, "learning_rate": 1e-3},
    schedule_steps=None,
    validation=None,
)
BOUNDARIES = {"open", "write", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir"}


class PlainEngine:
    """A linear layer and AdamW; `fill` is the value of all weights."""

    def __init__(self, fill=0.0, width=6):
        self.module = torch.nn.Linear(width, width)
        for parameter in self.module.parameters():
            torch.nn.init.constant_(parameter, fill)
        self.optimizer = torch.optim.AdamW(parameter_groups(self.module.named_parameters(), WEIGHT_DECAY))
        self.global_steps = self.skipped_steps = 0

    def zero_optimization_stage(self):
        return 0

    def fp16_enabled(self):
        return False

    @property
    def fill(self):
        (value,) = {x for parameter in self.module.parameters() for x in parameter.flatten().tolist()}
        return value


def save(run_dir, step, fill, **settings):
    """Save a checkpoint as in a run; return the Saver, which may not have published it yet."""
    saver = Saver(run_dir, IDENTITY, CheckpointConfig(**settings))
    saver.save(PlainEngine(fill), RunState(step=step))
    return saver


def save_killed(run_dir, step, fill, at, settings):
    """Save in a child killed before its `at`-th call that changes the disk; return 0 if it makes fewer."""
    child = os.fork()
    if child == 0:
        try:
            _kill_at(at)
            save(run_dir, step, fill, **settings).publish()
            sys.setprofile(None)
            os._exit(0)
        finally:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _kill_at(at):
    calls = count(1)

    def watch(frame, event, function):
        if event == "c_call" and function.__name__ in BOUNDARIES and next(calls) == at:
            os.kill(os.getpid(), signal.SIGKILL)

    threading.setprofile(watch)
    sys.setprofile(watch)
