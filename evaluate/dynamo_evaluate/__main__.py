"""`python -m dynamo_evaluate` is `dynamo-eval`."""

import sys

from .cli import main

sys.exit(main())
