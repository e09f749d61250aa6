"""`python -m megaft.doctor`, the former spelling of `python -m megaft doctor`, to be removed in the next release."""

import os
import sys

from megaft.base.exit_code import exit_code_of
from megaft.base.topology import is_main_of
from megaft.commands.doctor.command import main

if __name__ == "__main__":
    if is_main_of(os.environ):
        print("warning: `-m megaft.doctor` is now `-m megaft doctor`; this spelling will be removed.", file=sys.stderr)
    sys.exit(exit_code_of(main))
