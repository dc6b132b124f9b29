"""Estimates with 95 % intervals, the curve through them, and how far it stays inside plain decoding's own spread."""

from __future__ import annotations

import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial import Polynomial
from scipy import stats

from dynamo_runtime.interval import Interval

RESAMPLES = 1000
LEVEL = 0.95
ROUNDING = 1e-9
GRID = 401  # places at which a curve is looked at


@dataclass(frozen=True)
class Quotient:
    """A figure that is a sum over a sum, such as tokens per pass or the mean of a measure.

    Attributes:
        top: [seeds, prompts].
        bottom: [seeds, prompts]; 0 where a text has no say.
    """

    top: np.ndarray
    bottom: np.ndarray

    @classmethod
    def mean(cls, values: np.ndarray) -> Quotient:
        """Return the mean of values [seeds, prompts], those that are not numbers left out."""
        known = np.isfinite(values)
        return cls(np.where(known, values, 0.0), known.astype(float))

    @property
    def value(self) -> float:
        """Over everything."""
        return float(_divide(self.top.sum(), self.bottom.sum()))

    def by_seed(self) -> np.ndarray:
        """Return the figure of every seed, [seeds]."""
        return _divide(self.top.sum(1), self.bottom.sum(1))

    def replicates(self, draws: Draws) -> np.ndarray:
        """Return bootstrap replicates, [resamples]."""
        if self._by_seeds(draws):
            return _divide(draws.seeds @ self.top.sum(1), draws.seeds @ self.bottom.sum(1))
        return _divide(draws.prompts @ self.top.sum(0), draws.prompts @ self.bottom.sum(0))

    def replicates_by_seed(self, draws: Draws) -> np.ndarray:
        """Return the same of every seed, [resamples, seeds]."""
        if self._by_seeds(draws):
            return np.broadcast_to(self.by_seed(), (len(draws.seeds), len(self.top)))
        return _divide(draws.prompts @ self.top.T, draws.prompts @ self.bottom.T)

    def _by_seeds(self, draws: Draws) -> bool:
        """Tell whether only seeds are there to be resampled.

        So it is with a single prompt, and with figures of all prompts together.
        """
        return draws.clusters == 1 or self.top.shape[1] == 1


@dataclass(frozen=True)
class Draws:
    """How often every prompt, and every seed, is in each bootstrap sample; the same samples serve all figures.

    Attributes:
        prompts: [resamples, prompts].
        seeds: [resamples, seeds].
        clusters: Independent ones among the prompts.
    """

    prompts: np.ndarray
    seeds: np.ndarray
    clusters: int

    @classmethod
    def make(cls, clusters: Sequence[Hashable], seeds: int, stream: int = 0) -> Draws:
        """Sample with replacement, the same on every call.

        Args:
            clusters: Of every prompt, what it is drawn together with: turns of one conversation are not independent.
            seeds: How many there are.
            stream: Different ones are independent.
        """
        rng = np.random.default_rng(stream)
        numbers = {cluster: i for i, cluster in enumerate(dict.fromkeys(clusters))}

        def counts(n: int) -> np.ndarray:
            return rng.multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)

        drawn = counts(len(numbers))
        return cls(drawn[:, [numbers[cluster] for cluster in clusters]], counts(seeds), len(numbers))


def interval(value: float, replicates: np.ndarray) -> Interval:
    """Return an estimate with the percentile interval of its replicates; no width where there are none."""
    known = replicates[np.isfinite(replicates)]
    if len(known) == 0:
        return Interval(value, value, value)
    low, high = np.quantile(known, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Interval(value, float(low), float(high))


def spread(by_seed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return where the mean over the prompts at one more seed would lie: the 95 % prediction interval of Student's t.

    Args:
        by_seed: Means over the prompts, [..., seeds >= 2].

    Returns:
        Its ends, each [...].
    """
    count = by_seed.shape[-1]
    t = stats.t.ppf((1 + LEVEL) / 2, count - 1)
    reach = t * by_seed.std(axis=-1, ddof=1) * np.sqrt(1 + 1 / count)
    middle = by_seed.mean(axis=-1)
    return middle - reach, middle + reach


def widening(seeds: int) -> float:
    """Return how many times as wide `spread` is with some seeds as with many."""
    return float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1) * np.sqrt(1 + 1 / seeds) / stats.norm.ppf((1 + LEVEL) / 2))


def fit(x: np.ndarray, y: np.ndarray, degree: int) -> Polynomial:
    """Return the least-squares polynomial, of a lower degree where the points do not determine it."""
    return Polynomial.fit(x, y, max(0, min(degree, len(np.unique(x)) - 1)))


@dataclass(frozen=True)
class Estimates:
    """A figure of every setting, [settings], and its bootstrap replicates, [resamples, settings]."""

    values: np.ndarray
    replicates: np.ndarray


@dataclass(frozen=True)
class Ends:
    """Where plain's quality ends, below and above, and the same in every replicate, each [resamples]."""

    values: tuple[float, float]
    replicates: tuple[np.ndarray, np.ndarray]

    def hold(self, quality: float) -> bool:
        """Tell whether a quality is plain's."""
        low, high = self.values
        return low <= quality <= high


@dataclass(frozen=True)
class QualityCurve:
    """Quality against speed: a regression through the settings, and where it is as good as plain.

    Attributes:
        polynomial: The fit.
        places: Speeds at which it was looked at, [GRID], from the slowest setting to the fastest.
        fitted: The fit there.
        low: Lower end of its 95 % band, of the replicates whose settings reach as far.
        high: Upper end.
        inside: Whether it is plain's quality there.
        inside_replicates: The same of every bootstrap replicate, [resamples, GRID].
    """

    polynomial: Polynomial
    places: np.ndarray
    fitted: np.ndarray
    low: np.ndarray
    high: np.ndarray
    inside: np.ndarray
    inside_replicates: np.ndarray


def fit_curve(speed: Estimates, quality: Estimates, plain: Ends, degree: int) -> QualityCurve:
    """Fit quality against speed.

    The band comes from curves fitted to the replicates, so settings that share their prompts are not taken for
    independent.

    Args:
        speed: Speed-up of every setting.
        quality: Of every setting.
        plain: What counts as plain's quality.
        degree: Of the polynomial.
    """
    x, y, x_replicates, y_replicates = speed.values, quality.values, speed.replicates, quality.replicates
    polynomial = fit(x, y, degree)
    places = np.linspace(x.min(), x.max(), GRID)
    fitted = polynomial(places)
    known = np.isfinite(x_replicates).all(1) & np.isfinite(y_replicates).all(1)
    fits = np.full((len(x_replicates), GRID), np.nan)
    fits[known] = _fit_all(x_replicates[known], y_replicates[known], polynomial.degree(), places)
    low, high = (ends[:, None] for ends in plain.replicates)
    begin, end = x_replicates.min(1, keepdims=True), x_replicates.max(1, keepdims=True)
    within = _between(places, begin, end)
    inside = _between(fits, low, high) & within
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # a place that no replicate reaches has no band
        band = np.nanquantile(np.where(within, fits, np.nan), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return QualityCurve(polynomial, places, fitted, band[0], band[1], _between(fitted, *plain.values), inside)


@dataclass(frozen=True)
class SameQuality:
    """The same-quality speed-up: the largest speed at which quality is plain's.

    Attributes:
        speed: With its 95 % interval over the replicates in which there is one; NaN if there is none.
        share: Share of the replicates in which there is one.
    """

    speed: Interval
    share: float


def same_quality(curves: Sequence[QualityCurve]) -> SameQuality:
    """Return the largest speed at which every one of some curves, over the same settings, is inside plain's quality."""
    places = curves[0].places
    inside = np.all([curve.inside for curve in curves], axis=0)
    replicates = np.array([_last(places, row) for row in np.all([c.inside_replicates for c in curves], axis=0)])
    return SameQuality(interval(_last(places, inside), replicates), float(np.isfinite(replicates).mean()))


def _fit_all(x: np.ndarray, y: np.ndarray, degree: int, places: np.ndarray) -> np.ndarray:
    """`fit` of many sets of points at once, looked at in some places.

    Args:
        x: [sets, points].
        y: [sets, points].
        degree: Of the polynomials.
        places: [GRID].

    Returns:
        [sets, GRID].
    """
    low, high = x.min(1, keepdims=True), x.max(1, keepdims=True)
    middle, half = (low + high) / 2, np.maximum((high - low) / 2, np.finfo(float).tiny)
    powers = np.arange(degree + 1)
    coefficients = np.linalg.pinv(((x - middle) / half)[..., None] ** powers) @ y[..., None]
    fitted: np.ndarray = ((((places - middle) / half)[..., None] ** powers) @ coefficients)[..., 0]
    return fitted


def _between(values: np.ndarray, low: float | np.ndarray, high: float | np.ndarray) -> np.ndarray:
    """Tell whether values lie in [low, high], rounding aside; NaN does not."""
    below, above = ROUNDING * (1 + np.abs(low)), ROUNDING * (1 + np.abs(high))
    inside: np.ndarray = (values >= low - below) & (values <= high + above)
    return inside


def _last(places: np.ndarray, inside: np.ndarray) -> float:
    return float(places[np.flatnonzero(inside)[-1]]) if inside.any() else float("nan")


def _divide(top: np.ndarray, bottom: np.ndarray) -> np.ndarray:
    """Return the quotient; NaN for nothing over nothing."""
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.asarray(top / bottom)
