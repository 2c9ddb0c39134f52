"""`samray models` as a Ray job: `python -m jobs.models --config YAML ...`."""

import sys

from samray.cli import job

if __name__ == "__main__":
    sys.exit(job("models"))
