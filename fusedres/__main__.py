"""``python -m fusedres``: the same as the command ``fusedres``."""

import sys

from fusedres.cli import main

if __name__ == "__main__":
    sys.exit(main())
