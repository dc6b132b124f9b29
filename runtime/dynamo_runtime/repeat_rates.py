"""How often a text goes on as it did where its last tokens stood before: usually, and in the text at hand."""

from __future__ import annotations

_USUAL = (  # by hand, below what answers of SmolLM2 had; benchmarks/lookup.py says what others have
    (0.35, 0.65, 0.20),  # two tokens agree: there is no other such place, one that went on likewise, one that did not
    (0.45, 0.70, 0.22),  # three
    (0.55, 0.78, 0.28),  # four
    (0.63, 0.84, 0.32),  # five to seven
    (0.72, 0.88, 0.34),  # eight to fifteen
    (0.82, 0.93, 0.35),  # sixteen to thirty-one
    (0.92, 0.97, 0.42),  # more
)
_ROWS = [0, 0, 0, 1, 2, *[3] * 3, *[4] * 8, *[5] * 16, 6]  # of those, by the tokens that agree
_MEMORY = 0.97  # what a token counts for once the next one of its kind is known: by hand
_WEIGHT = 3.0  # tokens that must be known to count as much as what is usual of their kind: by hand
_WEIGHT_OF_ALL = 4.0  # the same of all kinds together: by hand


class Expected(float):
    """A confidence that is an expected acceptance already: what became of such drafts is in it."""


class RepeatRates:
    """Expected acceptance of what followed at the longest earlier occurrence of a text's end.

    By how many tokens agree, and by whether the text went on in the same way at the two latest places. What one kind of
    match turns out to be worth tells about the others too: some texts repeat themselves and others do not.
    """

    def __init__(self) -> None:
        """Begin with what is usual."""
        self._usual = [rate for kinds in _USUAL for rate in kinds]
        self._seen, self._right = [0.0] * len(self._usual), [0.0] * len(self._usual)
        self._all_right = self._all_expected = _WEIGHT_OF_ALL

    def add(self, length: int, agreement: int, right: bool) -> None:
        """Count what became of a match: arguments of `of`, and whether the text went on as it did there."""
        kind = _ROWS[length if length < len(_ROWS) else -1] * 3 + agreement
        self._seen[kind] = self._seen[kind] * _MEMORY + 1.0
        self._right[kind] = self._right[kind] * _MEMORY + right
        usual = (1 - _MEMORY) * _WEIGHT_OF_ALL
        self._all_right = self._all_right * _MEMORY + right + usual
        self._all_expected = self._all_expected * _MEMORY + self._usual[kind] + usual

    def of(self, length: int, agreement: int) -> Expected:
        """Return the expected acceptance of the token behind a match.

        Args:
            length: Tokens that agree, two or more.
            agreement: Whether there is no other place of that length (0), or one that went on likewise (1) or not (2).
        """
        kind = _ROWS[length if length < len(_ROWS) else -1] * 3 + agreement
        hoped = self._usual[kind] * min(self._all_right / self._all_expected, 1.0)
        return Expected((hoped * _WEIGHT + self._right[kind]) / (_WEIGHT + self._seen[kind]))
