"""Find, read and fill in batch scripts. Every inserted value is quoted."""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

from megaft.base.checks import require
from megaft.base.errors import ConfigError

ROOT = Path(__file__).parents[3]
DIRECTIVE = re.compile(r"#SBATCH\s+--([\w-]+)(?:[=\s]\s*(.*))?")


def find_script(name: str) -> Path:
    """Return the path of a recipe in slurm/, or of `name` itself if it is a file.

    Raises:
        ConfigError: It is neither.
    """
    candidates = (Path(name), ROOT / "slurm" / f"{name}.sbatch", ROOT / "slurm" / name)
    scripts = [path for path in candidates if path.is_file()]
    recipes = sorted(path.stem for path in (ROOT / "slurm").glob("*.sbatch"))
    require(
        bool(scripts), f"{name} is neither a batch script nor a recipe; use one of {', '.join(recipes)}, or a path."
    )
    return scripts[0]


def read_script(path: Path) -> str:
    """Return the text of a batch script.

    Raises:
        ConfigError: As in `read_text`, or the script does not start with #!.
    """
    text = read_text(path)
    require(text.startswith("#!") and "\0" not in text, f"{path} is not a script; its first line must be #!/bin/bash.")
    return text


def read_text(path: Path) -> str:
    """Return the text of a file that a job reads.

    Raises:
        ConfigError: The file cannot be read, is not UTF-8, or has Windows line endings, which bash cannot run.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; give a file that exists.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} has a byte at {error.start} that is not UTF-8; give a text file.") from error
    line = text.partition("\r")[0].count("\n") + 1
    require(
        "\r" not in text, f"{path}:{line} ends in CR LF, which bash cannot run; fix it with: sed -i 's/\\r$//' {path}"
    )
    return text


def directives_of(text: str) -> dict[str, str]:
    """Return the options of a script's `#SBATCH --option=value` lines; the last value counts, as in sbatch."""
    matches = [match for line in text.splitlines() if (match := DIRECTIVE.match(line))]
    return {match[1]: "".join(shlex.split(match[2] or "", comments=True)) for match in matches}


def fill_in(text: str, directives: dict[str, str], program_flags: list[str]) -> str:
    """Return the script with these directives instead of its own, and with the program's flags as its arguments.

    It also sets the paths of this megaft and Python, so it can be submitted from any folder. Every value is quoted.
    """
    for flag in program_flags:
        require_one_line("a flag", flag)
    lines = [line for line in text.splitlines() if _option(line) not in directives]
    end = max((number for number, line in enumerate(lines, 1) if _option(line)), default=1)
    given = [item for item in directives.items() if item != ("gpus-per-node", "0")]  # no GPU, no directive
    new = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in given]
    start = [f"export MEGAFT_HOME={shlex.quote(str(ROOT))} PYTHON={shlex.quote(sys.executable)}"]
    flags = [f"set -- {shlex.join(program_flags)}"] if program_flags else []
    return "\n".join([*lines[:end], *new, *start, *flags, *lines[end:]]) + "\n"


def _option(line: str) -> str | None:
    match = DIRECTIVE.match(line)
    return match and match[1]


def require_one_line(name: str, value: str) -> None:
    """Raise ConfigError if the value contains a line break or NUL, which would end its line in a batch script."""
    require(
        not re.search(r"[\n\r\0]", value),
        f"{name} is {value!r}; it must be one line of text. Remove the line break or NUL.",
    )
