"""Exceptions for errors that a user can fix, each with its exit code."""

REQUEUE, DO_NOT_REQUEUE = 75, 93
"""Exit codes for batch scripts: saved, requeue the job; and do not requeue it."""
CRASH = 1
"""Python's exit code for an uncaught exception."""


class UserError(Exception):
    """Base class of user errors. The one-line message names the setting or file, its value, the rule and a fix.

    Not a ValueError, which tyro would catch and print as its own.
    """

    exit_code = 2


class ConfigError(UserError):
    """Invalid setting, or conflicting settings."""


class DataError(UserError):
    """Unusable text, prepared dataset, tokenizer or model folder."""

    exit_code = 3


class ChatTemplateError(DataError):
    """Chat rejected by the tokenizer's chat template, with the template's message."""


class CheckpointError(UserError):
    """Checkpoint that is damaged, incomplete, or from another run."""

    exit_code = 4


class NumericsError(UserError):
    """Non-finite loss, gradient or nats, or a bad step at which the guard stops."""

    exit_code = 5


class NoProgressError(UserError):
    """Job that was requeued repeatedly without progress."""

    exit_code = DO_NOT_REQUEUE


class LostPeerError(UserError):
    """Loss of another rank, which ended or hangs. The same command resumes from the last checkpoint."""

    exit_code = REQUEUE


class FailedPeerError(UserError):
    """Failure of another rank with an unexpected exception, whose traceback that rank printed."""

    exit_code = CRASH


def kind_of(exit_code: int) -> type[UserError]:
    """Return the error class with this exit code."""
    return next(kind for kind in UserError.__subclasses__() if kind.exit_code == exit_code)


REPORT = "this is a bug in megaft: open an issue in its repository, with the run's config.json"
"""End of messages about errors that only a bug in megaft explains."""
