"""`python -m dynamo_runtime` is `dynamo-run`."""

import sys

from .cli.entry import run

sys.exit(run())
