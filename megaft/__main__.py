"""`python -m megaft`, which launchers of several ranks start: `torchrun --nproc-per-node 2 -m megaft generate ...`."""

import sys

from megaft.base.topology import own_flags
from megaft.cli import main

if __name__ == "__main__":
    sys.exit(main(own_flags()))
