"""Command-line interface `megaft COMMAND`, which imports only the module of the given command."""

from __future__ import annotations

import difflib
import sys
from dataclasses import dataclass
from importlib import import_module

import megaft
from megaft.base.errors import ConfigError
from megaft.base.exit_code import exit_code_of
from megaft.base.library_environment import set_library_environment


@dataclass(frozen=True, slots=True)
class Command:
    """Subcommand: summary, and the module that runs it."""

    summary: str
    module: str
    """Module of megaft whose `main` runs the command."""
    config: str | None
    """module:Class of the dataclass whose fields are the flags and which `main` takes; None if `main` parses them."""


COMMANDS = {
    "prepare": Command("tokenize text into a dataset on disk", "commands.prepare", "config.prepare:PrepareConfig"),
    "tokenizer": Command("train, measure or extend a tokenizer", "commands.tokenizer.command", None),
    "train": Command("finetune a model with DeepSpeed", "train", None),
    "generate": Command(
        "continue a text with a model", "commands.generate.command", "commands.generate.config:GenerateConfig"
    ),
    "convert": Command("change a model's format", "commands.convert.command", "commands.convert.config:ConvertConfig"),
    "validate": Command(
        "check a run's settings without a GPU", "commands.validate", "commands.validate:ValidateConfig"
    ),
    "estimate": Command(
        "estimate a run's memory, speed and duration",
        "commands.estimate.command",
        "commands.estimate.config:EstimateConfig",
    ),
    "doctor": Command("check this machine, or test its ranks", "commands.doctor.command", None),
    "submit": Command("write a batch script and submit it to SLURM", "commands.submit.command", None),
}

EVALUATION_HINT = "`python -m evaluate_zero_shot` scores models"
"""Hint for users who look for the evaluation program among the commands."""


def main(arguments: list[str] | None = None) -> int:
    """Run `megaft COMMAND ...` and return its exit code: 0 done, 2 usage or config, or one of megaft.base.errors.

    Raises:
        SystemExit: From the parser of the command's flags: 0 after its help, 2 after a bad flag.
    """
    return exit_code_of(dispatch, sys.argv[1:] if arguments is None else arguments)


def dispatch(arguments: list[str]) -> int:
    """Run the command that the first argument names, or print megaft's help or version."""
    name, *rest = arguments or ["--help"]
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"megaft {megaft.__version__}")
        return 0
    if name not in COMMANDS:
        raise ConfigError(unknown_command_message(name))
    return run(name, rest)


def run(name: str, arguments: list[str]) -> int:
    """Parse a command's flags, then import its module (slow for some commands) and run it."""
    set_library_environment()
    command = COMMANDS[name]
    if command.config is None:
        return import_module(f"megaft.{command.module}").main(arguments)
    import tyro

    module, _, config_class = command.config.partition(":")
    config = tyro.cli(getattr(import_module(f"megaft.{module}"), config_class), prog=f"megaft {name}", args=arguments)
    return import_module(f"megaft.{command.module}").main(config)


def usage() -> str:
    """Return the table of commands."""
    lines = [f"  {name:<10} {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            *("usage: megaft COMMAND [flags]", "", *lines, ""),
            f"`megaft COMMAND --help` lists a command's flags; {EVALUATION_HINT}.",
        ]
    )


def unknown_command_message(name: str) -> str:
    """Return the error message for an unknown command."""
    if name.startswith(("eval", "score")):
        return f"megaft has no command {name!r}; {EVALUATION_HINT}."
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    hint = f"did you mean `megaft {close[0]}`?" if close else f"use one of {', '.join(COMMANDS)}."
    return f"megaft has no command {name!r}; {hint}"


if __name__ == "__main__":
    sys.exit(main())
