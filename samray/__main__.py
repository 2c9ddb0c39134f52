"""`python -m samray` is the command `samray`."""

import sys

from samray.cli import main

sys.exit(main())
