"""Find, read and fill in batch scripts. Every value that goes into one is quoted."""

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
    """Return the path of a recipe of slurm/, or `name` itself where it is a file.

    Raises:
        ConfigError: It is neither.
    """
    candidates = (Path(name), ROOT / "slurm" / f"{name}.sbatch", ROOT / "slurm" / name)
    found = [path for path in candidates if path.is_file()]
    recipes = sorted(path.stem for path in (ROOT / "slurm").glob("*.sbatch"))
    require(bool(found), f"{name} is neither a batch script nor a recipe; use one of {', '.join(recipes)}, or a path.")
    return found[0]


def read_script(path: Path) -> str:
    """Return the text of a batch script.

    Raises:
        ConfigError: As `read_text`, or it does not start with #!.
    """
    text = read_text(path)
    require(text.startswith("#!") and "\0" not in text, f"{path} is no script; its first line must be #!/bin/bash.")
    return text


def read_text(path: Path) -> str:
    """Return the text of a file that a job reads.

    Raises:
        ConfigError: It cannot be read, is not UTF-8, or has Windows line ends, which bash cannot run.
    """
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}; name a file that is there.") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} has a byte at {error.start} that is not UTF-8; a batch script is text.") from error
    line = text.partition("\r")[0].count("\n") + 1
    require("\r" not in text, f"{path}:{line} ends in CR LF, which bash cannot run; mend it: sed -i 's/\\r$//' {path}")
    return text


def directives_of(text: str) -> dict[str, str]:
    """Return the `#SBATCH --option=value` lines of a script; the last of an option counts, as for sbatch."""
    found = [match for line in text.splitlines() if (match := DIRECTIVE.match(line))]
    return {match[1]: "".join(shlex.split(match[2] or "", comments=True)) for match in found}


def fill_in(text: str, directives: dict[str, str], program_flags: list[str]) -> str:
    """Return the script with these directives in the place of its own, and the program's flags in its first line.

    It also says where this megaft and this Python are, so it can be submitted from any folder. Every value is quoted.
    """
    for flag in program_flags:
        require_one_line("a flag", flag)
    lines = [line for line in text.splitlines() if _option(line) not in directives]
    end = max((number for number, line in enumerate(lines, 1) if _option(line)), default=1)
    given = [item for item in directives.items() if item != ("gpus-per-node", "0")]  # without a GPU: no directive
    ours = [f"#SBATCH --{name}={shlex.quote(value)}" for name, value in given]
    start = [f"export MEGAFT_HOME={shlex.quote(str(ROOT))} PYTHON={shlex.quote(sys.executable)}"]
    flags = [f"set -- {shlex.join(program_flags)}"] if program_flags else []
    return "\n".join([*lines[:end], *ours, *start, *flags, *lines[end:]]) + "\n"


def _option(line: str) -> str | None:
    match = DIRECTIVE.match(line)
    return match and match[1]


def require_one_line(name: str, value: str) -> None:
    """Raise ConfigError if the value would end its line in a batch script, or the script itself."""
    require(
        not re.search(r"[\n\r\0]", value),
        f"{name} is {value!r}; a batch script's value is one line of text. Take the line break or NUL out.",
    )
