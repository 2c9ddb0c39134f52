"""`python -m jobs.pretrain`: the same as `samray pretrain`."""

import sys

from samray.cli import job

if __name__ == "__main__":
    sys.exit(job("pretrain"))
