"""Names of parametrized cases."""

import re


def without_addresses(value: object) -> str:
    """A value as text that is the same in every process which collects the tests."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(value))
