"""`samray serve` as a Ray job: `python -m jobs.serve --config YAML ...`."""

import sys

from samray.cli import job

if __name__ == "__main__":
    sys.exit(job("serve"))
