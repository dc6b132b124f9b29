"""Figures of all texts of a results file, as arrays: speed, the measures, and what judges have said since."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import numpy as np

from .bootstrap import Quotient
from .errors import EvaluationError
from .generate import GENERATION
from .results import Record, Results

SPEED, TOKENS_PER_PASS = "speed", "tokens_per_pass"
AXES = {SPEED: "tokens/s ÷ plain", TOKENS_PER_PASS: "tokens per pass"}
MAUVE, SCORE, WIN_RATE = "mauve", "score", "win_rate"
PAIR = "pair"
WORTH = {"win": 1.0, "tie": 0.5, "lose": 0.0}
VERDICTS = tuple(WORTH)
MEASURES = {
    "nll": "base NLL",
    "distinct_2": "distinct-2",
    "distinct_3": "distinct-3",
    "repetition": "repeated 4-grams",
    "parsing": "parsing lines",
    MAUVE: "MAUVE",
    SCORE: "judge's score",
    WIN_RATE: "win rate",
}
"""Measures of quality, by the names they have in results, and what people call them."""


class Cells:
    """Figures of every text, as arrays [seeds, prompts]; only prompts that are finished everywhere are in them."""

    def __init__(self, results: Results):
        """Arrange the records.

        Raises:
            EvaluationError: No prompt is finished in every setting.
        """
        header = results.header
        self.settings = [setting["name"] for setting in header["settings"]]
        self.seeds: int = header["seeds"]
        self._said: dict[tuple[str, str], list[Record]] = defaultdict(list)
        for kind in (MAUVE, SCORE, PAIR):
            for record in results.of(kind):
                self._said[kind, record["setting"]].append(record)
        self._records = {_place(record): record for record in results.of(GENERATION)}
        self.wanted = len(header["texts"])
        finished = [
            [(text["id"], turn) for turn in range(len(text["turns"]))]
            for text in header["texts"]
            if all(
                (name, text["id"], turn, seed) in self._records
                for name in self.settings
                for turn in range(len(text["turns"]))
                for seed in range(self.seeds)
            )
        ]
        self.finished = len(finished)
        self.units = [unit for turns in finished for unit in turns]
        if not self.units:
            raise EvaluationError(f"{results.path} has no prompt yet that every setting has finished at every seed")

    def array(self, setting: str, read: Any) -> np.ndarray:
        """Return a figure of every text of one setting, [seeds, prompts]; None becomes NaN."""
        rows = [[read(self._records[(setting, *unit, seed)]) for unit in self.units] for seed in range(self.seeds)]
        return np.array(rows, dtype=float)

    def quotients(self, setting: str) -> dict[str, Quotient]:
        """Return tokens per pass, tokens per second, and every measure of quality that there is, of one setting."""
        tokens, passes, seconds = (
            self.array(setting, lambda record, name=name: record[name]) for name in ("tokens", "passes", "seconds")
        )
        found = {TOKENS_PER_PASS: Quotient(tokens, passes), SPEED: Quotient(tokens, seconds)}
        names = {name for record in self._records.values() for name in record["measures"]}
        for name in MEASURES:
            if name in names:
                values = self.array(setting, lambda record, name=name: record["measures"].get(name))
                found[name] = Quotient.mean(values)
        return found | self._judged(setting)

    def verdicts(self, setting: str) -> dict[str, Quotient]:
        """Return the shares of "win", "tie" and "lose" among a judge's verdicts; empty without any."""
        given = self._answers(PAIR, setting, "verdict")
        if not given:
            return {}
        return {
            verdict: Quotient.mean(self._places({place: each == verdict for place, each in given.items()}))
            for verdict in VERDICTS
        }

    def _judged(self, setting: str) -> dict[str, Quotient]:
        """Return the measures that judges have given since."""
        found = {}
        if records := self._said[MAUVE, setting]:
            by_seed = {record["seed"]: record["value"] for record in records}
            found[MAUVE] = Quotient.mean(np.array([[by_seed.get(seed, np.nan)] for seed in range(self.seeds)]))
        if scores := self._answers(SCORE, setting, "score"):
            found[SCORE] = Quotient.mean(self._places(scores))
        if verdicts := self._answers(PAIR, setting, "verdict"):
            for_it = self._places({place: WORTH[verdict] for place, verdict in verdicts.items()})
            known = np.isfinite(for_it)
            # Half a win and half a loss more than there were: a setting that never loses has a rate, too.
            half = np.where(known, 0.5 / max(known.sum(), 1), 0.0)
            top, bottom = np.where(known, for_it, 0.0), np.where(known, 1 - for_it, 0.0)
            found[WIN_RATE] = Quotient(top + half, bottom + half)
        return found

    def _answers(self, kind: str, setting: str, field: str) -> dict[tuple[str, int, int], Any]:
        """Return a judge's answers about one setting by prompt, turn and seed.

        Those that could not be read are left out.
        """
        return {
            (record["prompt"], record["turn"], record["seed"]): record[field]
            for record in self._said[kind, setting]
            if record[field] is not None
        }

    def _places(self, values: Mapping[tuple[str, int, int], float]) -> np.ndarray:
        """Return figures by prompt, turn and seed as an array [seeds, prompts], NaN where there is none."""
        return np.array(
            [[values.get((*unit, seed), np.nan) for unit in self.units] for seed in range(self.seeds)], float
        )

    def steps(self, setting: str) -> dict[int, float]:
        """Return the share of passes by the tokens they gave."""
        counts: dict[int, int] = defaultdict(int)
        for unit in self.units:
            for seed in range(self.seeds):
                for size, count in self._records[(setting, *unit, seed)]["steps"].items():
                    counts[int(size)] += count
        total = sum(counts.values())
        return {size: counts[size] / total for size in sorted(counts)}


def _place(record: Record) -> tuple[str, str, int, int]:
    return record["setting"], record["prompt"], record["turn"], record["seed"]
