"""A drafter of one's own, against the public interface alone: it guesses that the text repeats itself.

    python examples/custom_drafter.py [BUNDLE]

Whatever a drafter guesses, the first head verifies: with drafts that are certain, as these are, the text is token by
token the one that plain decoding writes from the same seed.
"""

import sys
from collections.abc import Sequence

import numpy as np

from dynamo_runtime import DEFAULT_BUNDLE, Ask, Candidates, Engine, Guesses, Passed, register_drafter

PROMPT = """class Point:
    def __init__(self, x, y):
        self.x = x
        self.y = y

    def __init__(self, x, y"""


class Echo:
    """Whatever stood behind the last tokens when they stood there before (prompt lookup, Saxena 2023)."""

    ask = Ask()  # nothing of the pass: neither heads nor look-ahead tokens, so any bundle will do

    def __init__(self, depth: int = 4, match: int = 2):
        """Guess up to `depth` tokens behind the latest earlier place of the last `match` tokens."""
        self.depth = depth
        self._match = match

    def guess(self, passed: Passed) -> Guesses | None:
        """Return what followed at the earlier place, one token after the other; None if there is none."""
        text = [*passed.context.tokens, *passed.final]
        pattern = text[-self._match :]
        for place in range(len(text) - self._match - 1, -1, -1):
            if text[place : place + self._match] == pattern:
                return lambda chosen: certain(text[place + self._match + len(chosen) - 1 :][:1])
        return None


def certain(tokens: Sequence[int]) -> Candidates:
    """Return all of the distribution on one token, or no guess at all."""
    return Candidates(np.array(tokens, np.int64), np.ones(len(tokens)))


def main() -> None:
    """Decode plainly, then with the drafter, and compare."""
    register_drafter("echo", lambda bundle, parameters: Echo())
    engine = Engine(sys.argv[1] if len(sys.argv) > 1 else DEFAULT_BUNDLE)
    plain = engine.generate(PROMPT, strategy="autoregressive", seed=1, max_new_tokens=64)
    engine.reset()
    drafted = engine.generate(PROMPT, strategy="speculative", drafter="echo", seed=1, max_new_tokens=64)
    print(drafted.text)
    for found in (plain, drafted):
        print(found.statistics.line(), file=sys.stderr)
    if drafted.tokens != plain.tokens:
        sys.exit("the texts differ")


if __name__ == "__main__":
    main()
