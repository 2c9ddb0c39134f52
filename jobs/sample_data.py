"""`samray sample-data` as a Ray job: `python -m jobs.sample_data --config YAML ...`."""

import sys

from samray.cli import job

if __name__ == "__main__":
    sys.exit(job("sample-data"))
