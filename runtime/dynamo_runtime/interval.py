"""Estimates with how sure they are."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """An estimate with its 95 % confidence interval."""

    value: float
    low: float
    high: float
