"""Command `python -m evaluate_zero_shot.report DIR`: write the report of DIR/results.json again."""

import sys

from evaluate_zero_shot.report.write import main
from megaft.base.exit_code import exit_code_of

if __name__ == "__main__":
    sys.exit(exit_code_of(main))
