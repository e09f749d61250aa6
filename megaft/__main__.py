"""`python -m megaft`, which launchers of several ranks start: `torchrun --nproc-per-node 2 -m megaft generate ...`."""

import sys

from megaft.cli import main
from megaft.topology import own_flags

if __name__ == "__main__":
    sys.exit(main(own_flags()))
