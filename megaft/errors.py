"""What a user can get wrong, and the exit code each kind ends the program with."""


class UserError(ValueError):
    """Names the setting or file, its value, the rule, and a value that works. Shown without a traceback."""

    exit_code = 2


class ConfigError(UserError):
    """A setting, or two settings that do not go together."""


class DataError(UserError):
    """A text, a prepared dataset, a tokenizer or a model folder that cannot be used."""

    exit_code = 3


class CheckpointError(UserError):
    """A checkpoint that is damaged, incomplete, or belongs to another run."""

    exit_code = 4


class NumericsError(UserError):
    """A loss or gradient that is not finite."""

    exit_code = 5
