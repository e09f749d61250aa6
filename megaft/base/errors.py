"""Errors that a user can mend, and the exit code of each kind."""


class UserError(Exception):
    """Names the setting or file, its value, the rule, and a value that works. Shown as one line, without a traceback.

    No ValueError: tyro would take it for one of its own, and break it into a box.
    """

    exit_code = 2


class ConfigError(UserError):
    """A setting out of range, or settings that contradict each other."""


class DataError(UserError):
    """A text, a prepared dataset, a tokenizer or a model folder that cannot be used."""

    exit_code = 3


class ChatTemplateError(DataError):
    """A chat that the tokenizer's chat template refuses, in the template's words."""


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete, or belongs to another run."""

    exit_code = 4


class NumericsError(UserError):
    """A loss, a gradient or nats of a text that are not finite, or that the guard was told to stop at."""

    exit_code = 5


class NoProgressError(UserError):
    """A job that is requeued again and again gets no further."""

    exit_code = 93


class LostPeerError(UserError):
    """Another rank ended or hangs. The same command continues from the last checkpoint, so requeue it."""

    exit_code = 75


class FailedPeerError(UserError):
    """Another rank ended with an exception that is no UserError, whose traceback it printed."""

    exit_code = 1


def kind_of(exit_code: int) -> type[UserError]:
    """Return the class of errors that end the program with this code."""
    return next(kind for kind in UserError.__subclasses__() if kind.exit_code == exit_code)


REPORT = "this is a defect of megaft: open an issue in its repository, with the run's config.json"
"""End of messages about what only a defect explains."""
