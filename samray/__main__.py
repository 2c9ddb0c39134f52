"""`python -m samray` is the command `samray`."""

import sys

from samray.cli import main

if __name__ == "__main__":
    sys.exit(main())
