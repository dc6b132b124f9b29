"""Plots of a summary, as PNG and SVG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dynamo_runtime.errors import printable

from .cells import AXES, MEASURES, SPEED, TOKENS_PER_PASS
from .errors import EvaluationError
from .summary import Outcome, Summary, variants

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("png", "svg")
BLUE, GREY, RED = "#2563a8", "#8a8f98", "#b3372e"
STEP_COLOURS = ("#c6dbef", "#6baed6", "#2171b5", "#08306b", "#041c3d")
# Okabe and Ito's colours, which people with any colour vision tell apart.
VARIANT_COLOURS: tuple[str, ...]
VARIANT_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8a8f98", "#7b5ea7")
VARIANT_COLOURS += ("#b3372e", "#7f6000")
MARKERS = "osD^vPX*hp"  # not as many as colours, so that pairs of both stay different for long
PANEL = (4.2, 3.2)  # inches
BAND_STEP = 10  # of a curve's places every so many are drawn
MOST_LABELS = 6


def draw(summary: Summary, folder: Path) -> list[Path]:
    """Draw what there is: the curve of every variant, all variants together, and the steps.

    Args:
        summary: Of the results.
        folder: Where the files go; it is made.

    Returns:
        The files.

    Raises:
        EvaluationError: Matplotlib is not there, or the folder cannot be written.
    """
    try:
        import matplotlib

        matplotlib.use("Agg")
    except ImportError:
        raise EvaluationError("plots need matplotlib: pip install 'dynamo-edge[eval]'") from None
    matplotlib.rcParams.update(
        {
            "font.size": 9,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "svg.fonttype": "none",
            "svg.hashsalt": "0",
            "text.parse_math": False,  # names of bundles may hold dollar signs
        }
    )
    figures: dict[str, Figure] = {}
    names = [name for name in variants(summary) if summary.curves[name, SPEED]]  # a single ε_b is no curve
    if len(names) == 1:
        figures["curve"] = _curve(summary, names[0], SPEED)
        figures["curve_tokens"] = _curve(summary, names[0], TOKENS_PER_PASS)
        figures["steps"] = _steps(summary, names[0])
    elif names:
        figures["variants"] = _compared(summary, names, SPEED)
        figures["variants_tokens"] = _compared(summary, names, TOKENS_PER_PASS)
    return [path for name, figure in figures.items() for path in _save(figure, folder / name)]


def _curve(summary: Summary, variant: str, axis: str) -> Figure:
    """Draw quality against speed, a panel a measure: settings, regression with its band, and plain's spread."""
    curves = summary.curves[variant, axis]
    figure, panels = _panels(len(curves), legend=True)
    members = _members(summary, variant)
    handles: dict[str, Any] = {}
    for axes, (measure, curve) in zip(panels, curves.items(), strict=True):
        low, high = summary.plain[measure]
        handles["plain, one more seed"] = _shade(axes, low, high)
        drawn = slice(None, None, BAND_STEP)
        axes.fill_between(curve.places[drawn], curve.low[drawn], curve.high[drawn], color=BLUE, alpha=0.2, lw=0)
        (line,) = axes.plot(curve.places[drawn], curve.fitted[drawn], color=BLUE, lw=1.5)
        handles["regression, 95 % band"] = line
        points = [outcome for outcome in members if measure in outcome.measures]
        handles["ε_b, 95 % intervals"] = _points(axes, points, axis, measure)
        _label_thresholds(axes, points, axis, measure)
        same = summary.same[variant, axis][measure].speed
        title = "nowhere plain's quality"
        if np.isfinite(same.value):
            title = f"plain's quality up to {same.value:.2f} [{same.low:.2f}, {same.high:.2f}]"
            handles["same quality, 95 % interval"] = axes.axvline(same.value, color=RED, lw=1, ls="--")
            axes.axvspan(same.low, same.high, color=RED, alpha=0.08, lw=0)
        axes.set_title(title, fontsize=8)
        _frame(axes, [np.nanmin(curve.low), np.nanmax(curve.high), low, high, *_extent(points, measure)])
        axes.set(xlabel=AXES[axis], ylabel=MEASURES[measure])
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    figure.suptitle(f"{printable(summary.header['bundle']['name'])}: quality against {AXES[axis]}", fontsize=10)
    return figure


def _compared(summary: Summary, names: Sequence[str], axis: str) -> Figure:
    """Return all variants in one panel a measure, their settings joined in the order of ε_b."""
    measures = [measure for measure in MEASURES if any(measure in summary.curves[name, axis] for name in names)]
    figure, panels = _panels(len(measures), legend=True)
    handles: dict[str, Any] = {}
    for axes, measure in zip(panels, measures, strict=True):
        low, high = summary.plain[measure]
        handles["plain, one more seed"] = _shade(axes, low, high)
        extent = [low, high]
        for name, colour, marker in zip(names, cycle(VARIANT_COLOURS), cycle(MARKERS), strict=False):
            points = [outcome for outcome in _members(summary, name) if measure in outcome.measures]
            speeds = [getattr(outcome, axis).value for outcome in points]
            values = [outcome.measures[measure].value for outcome in points]
            (handles[name],) = axes.plot(speeds, values, color=colour, marker=marker, ms=4, lw=1)
            extent += values
        _frame(axes, extent)
        axes.set(xlabel=AXES[axis], ylabel=MEASURES[measure])
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=8)
    title = f"{printable(summary.header['bundle']['name'])}: every variant at every ε_b"
    figure.suptitle(title, fontsize=10)
    return figure


def _steps(summary: Summary, variant: str) -> Figure:
    """Draw the share of passes that gave 1, 2, … tokens against ε_b, and tokens per pass."""
    figure, (axes,) = _panels(1)
    members = _members(summary, variant)
    thresholds = [outcome.setting["threshold"] for outcome in members]
    sizes = sorted({size for outcome in members for size in outcome.steps})
    shares = [[outcome.steps.get(size, 0.0) for outcome in members] for size in sizes]
    labels = [f"{size} token{'s' * (size > 1)}" for size in sizes]
    axes.stackplot(thresholds, shares, labels=labels, colors=STEP_COLOURS)
    axes.set(xlabel="ε_b", ylabel="share of passes", ylim=(0, 1), xlim=(min(thresholds), max(thresholds)))
    twin = axes.twinx()
    twin.spines["right"].set_visible(True)
    twin.plot(thresholds, [outcome.tokens_per_pass.value for outcome in members], color=RED, marker="o", ms=3, lw=1.5)
    twin.set_ylim(1, max(sizes))
    twin.set_ylabel("tokens per pass", color=RED)
    axes.legend(loc="lower left", fontsize=7)
    return figure


def _panels(count: int, legend: bool = False) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    columns = min(count, 3)
    rows = -(-count // columns)
    figure = Figure(figsize=(PANEL[0] * columns, PANEL[1] * rows + 0.6 * legend), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False).flat)
    for axes in panels[count:]:
        axes.set_axis_off()
    return figure, panels[:count]


def _shade(axes: Axes, low: float, high: float) -> Any:
    return axes.axhspan(low, high if np.isfinite(high) else 1e6, color=GREY, alpha=0.25, lw=0)


def _points(axes: Axes, outcomes: Sequence[Outcome], axis: str, measure: str) -> Any:
    quality = [outcome.measures[measure] for outcome in outcomes]
    speeds = [getattr(outcome, axis) for outcome in outcomes]
    return axes.errorbar(
        [speed.value for speed in speeds],
        [value.value for value in quality],
        xerr=_reach(speeds),
        yerr=_reach(quality),
        fmt="o",
        ms=3.5,
        color=BLUE,
        elinewidth=0.6,
        alpha=0.8,
    )


def _label_thresholds(axes: Axes, outcomes: Sequence[Outcome], axis: str, measure: str) -> None:
    """Write ε_b beside some of the settings."""
    for outcome in outcomes[:: max(1, len(outcomes) // MOST_LABELS)]:
        place = getattr(outcome, axis).value, outcome.measures[measure].value
        label = f"{outcome.setting['threshold']:g}"
        axes.annotate(label, place, textcoords="offset points", xytext=(4, 4), fontsize=7)


def _reach(values: Sequence[Any]) -> np.ndarray:
    """Return how far intervals go below and above their estimates, [2, values]."""
    below = [max(0.0, value.value - value.low) for value in values]
    return np.array([below, [max(0.0, value.high - value.value) for value in values]])


def _extent(outcomes: Sequence[Outcome], measure: str) -> list[float]:
    return [end for outcome in outcomes for end in (outcome.measures[measure].low, outcome.measures[measure].high)]


def _frame(axes: Axes, values: Sequence[float]) -> None:
    """Make room for what is finite, and a little more."""
    known = [value for value in values if np.isfinite(value)]
    margin = 0.06 * (max(known) - min(known) or 1)
    axes.set_ylim(min(known) - margin, max(known) + margin)


def _members(summary: Summary, variant: str) -> list[Outcome]:
    found = [outcome for outcome in summary.outcomes.values() if outcome.setting["variant"] == variant]
    return sorted(found, key=lambda outcome: outcome.setting["threshold"])


def _save(figure: Figure, path: Path) -> list[Path]:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        files = [path.with_suffix(f".{name}") for name in FORMATS]
        for file in files:
            metadata: Mapping[str, Any] = {"Date": None} if file.suffix == ".svg" else {}
            figure.savefig(file, dpi=130, metadata=dict(metadata))
    except OSError as error:
        raise EvaluationError(f"cannot write plots beside {path}: {error.strerror or error}") from error
    return files
