"""`python -m megaft.doctor`, the former name of `python -m megaft doctor`. It goes in the next release."""

import sys

from megaft.commands.doctor.command import main

if __name__ == "__main__":
    sys.exit(main())
