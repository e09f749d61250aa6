"""`python -m detokenizers NAME [--invert] < in > out`, `--list`, `NAME --check FILE`: bytes in, bytes out."""

import argparse
import os
import sys

import detokenizers
from detokenizers._check import report
from detokenizers._text import decode, encode, read

_BAD_USE, _BAD_FILE = 2, 3


def main(arguments: list[str] | None = None) -> int:
    """Run the command; return 0, or 1 if a checked file does not round-trip, 2 for bad use and 3 for a bad file."""
    try:
        try:
            return _run(_parser().parse_args(arguments))
        finally:
            sys.stdout.flush()
    except ValueError as error:
        print(f"detokenizers: {error}", file=sys.stderr)
        return _BAD_USE
    except BrokenPipeError:  # the reader closed the pipe; flushing the rest of the buffer must not fail a second time
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"detokenizers: {error.filename or 'standard input'}: {error.strerror}", file=sys.stderr)
        return _BAD_FILE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m detokenizers", description="Undo a corpus's word tokenization.")
    parser.add_argument("name", nargs="?", help=f"one of {', '.join(detokenizers.names())}")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--invert", action="store_true", help="restore the corpus from its text")
    mode.add_argument(
        "--list",
        action="store_true",
        help="list the detokenizers: corpus, source, and different texts that become equal",
    )
    mode.add_argument(
        "--check",
        metavar="FILE",
        help="check that FILE round-trips, and list texts that published rules make equal; without NAME, try every "
        "invertible detokenizer on FILE",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.list:
        names = [options.name] if options.name else detokenizers.names()
        print("\n".join(map(_describe, names)), flush=True)
        return 0
    if options.check is not None:
        names = [options.name] if options.name else filter(detokenizers.is_invertible, detokenizers.names())
        verdicts = [report(name, options.check) for name in names]
        return int(not all(verdicts))
    if options.name is None:
        raise ValueError(f"a name is missing; use one of {', '.join(detokenizers.names())}, or --list.")
    for text in detokenizers.stream(options.name, invert=options.invert)(decode(read(sys.stdin.buffer))):
        sys.stdout.buffer.write(encode(text))
    sys.stdout.buffer.flush()
    return 0


def _describe(name: str) -> str:
    kind = "invertible" if detokenizers.is_invertible(name) else "lossy"
    same = "; ".join(f"{first!r} = {second!r}" for first, second in detokenizers.known_collisions(name))
    return f"{name:18} {kind:10}  {detokenizers.source(name)}" + (f". Makes the same: {same}" if same else "")


if __name__ == "__main__":
    sys.exit(main())
