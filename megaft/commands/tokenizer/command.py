"""`megaft tokenizer`: train, measure or extend a tokenizer."""

from __future__ import annotations

from importlib import import_module
from typing import NamedTuple

import tyro

from megaft.base.errors import ConfigError
from megaft.commands.tokenizer.config import CheckConfig, ExtendConfig, TrainConfig


class Action(NamedTuple):
    """An action of `megaft tokenizer`."""

    summary: str
    config: type
    """Its settings, whose fields are the flags."""
    module: str
    """Module of megaft.commands.tokenizer whose `main` runs it."""


ACTIONS = {
    "train": Action("train a tokenizer on text", TrainConfig, "train"),
    "check": Action("measure a tokenizer on text", CheckConfig, "check"),
    "extend": Action("add special tokens to a model and its tokenizer", ExtendConfig, "extend"),
}


def main(arguments: list[str]) -> int:
    """Run the action that the first argument names, or print the actions; return the exit code.

    Raises:
        UserError: The action is unknown, or fails.
        SystemExit: From the parser of its flags.
    """
    name, *flags = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name not in ACTIONS:
        raise ConfigError(f"megaft tokenizer has no action {name!r}; use {', '.join(ACTIONS)}.")
    config = tyro.cli(ACTIONS[name].config, args=flags, prog=f"megaft tokenizer {name}")
    return import_module(f"megaft.commands.tokenizer.{ACTIONS[name].module}").main(config)


def usage() -> str:
    """Return the table of actions."""
    lines = [f"  {name:<10} {action.summary}" for name, action in ACTIONS.items()]
    return "\n".join(
        ["usage: megaft tokenizer ACTION ...", "", *lines, "", "`megaft tokenizer ACTION --help` has flags."]
    )
