"""`samray pretrain` as a job: `python -m jobs.pretrain --config YAML ...`."""

import sys

from samray.cli import job

if __name__ == "__main__":
    sys.exit(job("pretrain"))
