"""`python -m dynamo_runtime` is `dynamo-run`."""

import sys

from .cli.run import main

sys.exit(main())
