"""`samray predict` as a Ray job: `python -m jobs.predict --config YAML ...`."""

import sys

from samray.cli import job

if __name__ == "__main__":
    sys.exit(job("predict"))
