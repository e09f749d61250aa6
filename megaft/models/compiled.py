"""Compilation with torch.compile: equal blocks of a model share one graph."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from shutil import which
from typing import Any

import torch
from torch._dynamo.callback import CallbackArgs, on_compile_end, on_compile_start

from megaft.base import parallel
from megaft.base.errors import ConfigError
from megaft.base.progress import say
from megaft.models.attention import takes_masks
from megaft.models.blocks import blocks_of
from megaft.weights.loading.causal_lm import CausalLM

OPTIONS = {"fallback_random": True}
"""Options of torch's compiler: dropout draws the same masks as in eager mode."""

MAX_GRAPHS = 256
"""Maximum graphs of one kind of block; torch compiles another one for other shapes, masks and constants of a layer."""


def compile_blocks(model: CausalLM, choice: str, is_partitioned: bool = False) -> None:
    """Compile each block of a model, if `choice` and the machine allow.

    "off" holds for all functions of the process that are compiled.

    Args:
        model: The model, before deepspeed.initialize.
        choice: "on", "off", or "auto": on a GPU, for families whose block is known to compile into one graph.
        is_partitioned: True at ZeRO stage 3, whose hooks inside blocks cannot be compiled.

    Raises:
        ConfigError: The choice is "on", but there is no compiler, or the model has no blocks.
    """
    torch.compiler.set_stance("force_eager" if choice == "off" else "default")
    if is_partitioned:
        return
    blocks = blocks_of(model)
    obstacle = missing_compiler() or ("" if blocks else f"{type(model).__name__} is not made of transformers' blocks")
    if choice == "on" and obstacle:
        raise ConfigError(f"--model.compile is on, but {obstacle}. Use --model.compile off.")
    if choice == "on" or (choice == "auto" and not obstacle and torch.cuda.is_available() and takes_masks(model)):
        _configure_compiler()
        for block in blocks:
            block.compile(fullgraph=takes_masks(model), options=OPTIONS)


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of tensors compiled into one graph for all shapes; unchanged if there is no compiler."""
    if missing_compiler():
        return function
    _configure_compiler()
    return torch.compile(function, fullgraph=True, dynamic=True)


def in_eager_mode() -> AbstractContextManager[Any]:
    """Return a context in which compiled blocks run uncompiled, as for scoring, whose shapes vary."""
    return torch.compiler.set_stance("force_eager")


def missing_compiler() -> str:
    """Return the reason why torch.compile cannot run on this machine; an empty string if it can."""
    if torch.cuda.is_available():
        if not find_spec("triton"):
            return "triton is not installed"
        compilers = [os.environ["CC"]] if "CC" in os.environ else ["gcc", "clang", "cc"]
        return "" if any(map(which, compilers)) else f"there is no C compiler ({', '.join(compilers)})"
    compiler = os.environ.get("CXX", "g++")
    return "" if which(compiler) else f"there is no C++ compiler ({compiler})"


@cache
def _configure_compiler() -> None:
    """Keep compiled code in the virtual environment, if there is one, and print how long each compilation takes."""
    if sys.prefix != sys.base_prefix and os.access(sys.prefix, os.W_OK):
        os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(Path(sys.prefix) / "torch_inductor"))
    torch._dynamo.config.recompile_limit = MAX_GRAPHS
    started = 0.0

    @on_compile_start
    def start(_: CallbackArgs) -> None:
        nonlocal started
        started = time.monotonic()

    @on_compile_end
    def end(_: CallbackArgs) -> None:
        say(f"compiled a part of the model in {time.monotonic() - started:.1f} s", parallel.is_main())
