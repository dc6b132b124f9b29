"""Profiles as one HTML page that needs nothing but itself."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..device.profile import Profile
from ..errors import ProfileError, printable
from ..quiet import hush
from ..tables import number
from .report import caveats, comparison, is_plain, tables
from .series import grid

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 4.4, 2.7  # inches without legend: a phone then shows letters about as large as they are drawn
LONGEST_NAME = 36  # characters of a name in a plot
WIDE_RANGE = 15.0  # between the peaks of two curves: beyond it one is flat unless the scale is logarithmic
MARKERS = "osD^vPX*"
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#d9dde2",
    "legend.frameon": False,
    "lines.markersize": 5,
    "savefig.transparent": True,
    "svg.fonttype": "none",
    "svg.hashsalt": "dynamo-profile",  # the same profiles give the same page
    "text.parse_math": False,  # names of bundles may hold dollar signs
}


Named = list[tuple[str, Profile]]


@dataclass(frozen=True)
class Plot:
    """A picture, and what it shows in words."""

    title: str
    description: str
    svg: str


@dataclass(frozen=True)
class PlotLine:
    """A line of a plot.

    Attributes:
        profile: Number of its profile.
        kind: What it is a line of.
        points: (x, y), or (x, y, low, high) with a band around the line.
        line: Matplotlib's style of line.
        color: Number of its colour and marker, if that is not the profile's.
    """

    profile: int
    kind: str
    points: list[tuple[float, ...]]
    line: Any = "-"
    color: int | None = None

    @property
    def style(self) -> dict[str, Any]:
        """Colour and marker, for matplotlib."""
        number = self.profile if self.color is None else self.color
        return {"color": f"C{number % 10}", "marker": MARKERS[number % len(MARKERS)]}


def check_extra() -> None:
    """See that the page can be made, before anything is measured for it.

    Raises:
        ProfileError: Matplotlib or jinja2 is not installed.
    """
    hush()
    try:
        import jinja2  # noqa: F401
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise ProfileError("the HTML page needs the extra [profile]: pip install 'dynamo-edge[profile]'") from error


def page(profiles: Sequence[Profile], names: Sequence[str]) -> str:
    """Return a page with plots and tables of a profile, or of several side by side.

    Args:
        profiles: One or more.
        names: Of the profiles.

    Raises:
        ProfileError: Matplotlib or jinja2 is not installed.
    """
    check_extra()
    import jinja2
    import matplotlib

    several = len(profiles) > 1
    named = [(printable(name), profile) for name, profile in zip(names, profiles, strict=True)]
    with matplotlib.rc_context(STYLE):
        plots = [*_cost(named), _layers(named), _past(named), _strategies(named), _first_token(named), _backoff(named)]
    environment = jinja2.Environment(loader=jinja2.PackageLoader(__package__ or "", "."), autoescape=True)
    return environment.get_template("page.html.jinja").render(
        title=f"{len(profiles)} profiles side by side" if several else f"Profile of {named[0][0]}",
        subjects=[(name if several else "", _subject(profile)) for name, profile in named],
        warnings=[(name if several else "", text) for name, profile in named for text in caveats(profile)],
        plots=[plot for plot in plots if plot],
        comparison=comparison(profiles, names) if several else None,
        profiles=[(name, tables(profile)) for name, profile in named],
    )


def _subject(profile: Profile) -> str:
    bundle, device = profile.bundle, profile.device
    return (
        f"Bundle {bundle.name} ({bundle.kind}, {bundle.precision}) on {device.gpu or device.processor}, "
        f"provider {device.provider}, onnxruntime {device.onnxruntime}, {profile.created[:10]}."
    )


def _short(name: str) -> str:
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 1] + "…"


def _cost(named: Named) -> list[Plot | None]:
    """Cost of a pass by its rows, at the shortest past and at the longest."""
    several = len(named) > 1
    ends: list[list[PlotLine]] = [[], []]
    behind: list[set[int]] = [set(), set()]
    for i, (_, profile) in enumerate(named):
        passes, pasts = grid(profile), sorted({p.past for p in profile.passes})
        for end, past in enumerate(dict.fromkeys((*pasts[:1], *pasts[-1:]))):
            behind[end].add(past)
            single = passes.get((False, past, 1))
            # Milliseconds of several machines would hide the shape, which is what drafting depends on.
            unit = 1.0 if not several else single.time.p50 if single else math.nan
            for heads in (False, True):
                points = [(p.rows, p.time.p50 / unit) for p in profile.passes if (p.heads, p.past) == (heads, past)]
                kind, line = ("with further heads", "--") if heads else ("without further heads", "-")
                ends[end].append(PlotLine(i, kind, [*points], line, None if several else int(heads)))
    axes = ("rows of the pass, m", "÷ one row without heads" if several else "ms, p50")
    heights = [y for curves in ends for curve in curves for _, y, *_ in curve.points if math.isfinite(y)]
    return [
        _lines(
            f"Cost of a pass behind {_few(pasts)} tokens, by its rows",
            axes,
            curves,
            named,
            top=max(heights, default=1.0),
        )
        for pasts, curves in zip(behind, ends, strict=True)
    ]


def _few(counts: set[int]) -> str:
    """Return one count, or the range of several."""
    return " to ".join(f"{count:,}" for count in dict.fromkeys((min(counts), max(counts)))) if counts else "no"


def _layers(named: Named) -> Plot | None:
    """Cost of the drafter's layers by the positions that they read, behind the shortest past."""
    curves = []
    for i, (_, profile) in enumerate(named):
        runs = profile.drafter.layers if profile.drafter else []
        shortest = min((run.past for run in runs), default=0)
        curves.append(PlotLine(i, "layers", [(run.positions, run.time.p50) for run in runs if run.past == shortest]))
    title = "The drafter's layers, by the positions that they catch up on"
    return _lines(title, ("positions read at once", "ms, p50"), curves, named)


def _past(named: Named) -> Plot | None:
    """Cost of one row by the length of the past, and the roofline below it."""
    curves = []
    for i, (_, profile) in enumerate(named):
        measured = [(p.past, p.time.p50) for p in profile.passes if p.rows == 1 and not p.heads]
        curves.append(PlotLine(i, "measured", [*measured]))
        curves.append(PlotLine(i, "roofline floor", [(f.past, f.floor) for f in profile.roofline], ":"))
    return _lines("One row without heads, by the length of its past", ("positions before", "ms, p50"), curves, named)


def _first_token(named: Named) -> Plot | None:
    curves = []
    for i, (_, profile) in enumerate(named):
        times = [(p.tokens, p.first_token) for p in profile.prefill]
        curves.append(PlotLine(i, "p50, shaded up to p99", [(tokens, t.p50, t.p50, t.p99) for tokens, t in times]))
    return _lines("Time to the first token, by length of the prompt", ("prompt tokens", "ms"), curves, named)


def _backoff(named: Named) -> Plot | None:
    curves = []
    for i, (_, profile) in enumerate(named):
        gains = [(b.threshold, b.speedup) for b in profile.backoff]
        curves.append(PlotLine(i, "estimate, 95 % interval", [(at, g.value, g.low, g.high) for at, g in gains]))
    axes = ("back-off threshold ε_b", "tokens/s ÷ plain")
    return _lines("What dynamo gains, by back-off threshold", axes, curves, named, plain=1.0)


def _lines(
    title: str,
    axes_names: tuple[str, str],
    curves: list[PlotLine],
    named: Named,
    top: float | None = None,
    plain: float | None = None,
) -> Plot | None:
    """Return a plot of curves; None if they have no points.

    Args:
        title: What it shows.
        axes_names: With units.
        curves: Those without points are left out.
        named: The profiles.
        top: Highest y that must fit; the scale starts at zero.
        plain: Where to draw the line of plain decoding.
    """
    curves = [replace(curve, points=sorted(curve.points)) for curve in curves]
    curves = [curve for curve in curves if curve.points and all(math.isfinite(y) for _, y, *_ in curve.points)]
    if not curves:
        return None

    def draw(axes: Axes) -> list[Artist]:
        for curve in curves:
            x, y, *band = zip(*curve.points, strict=True)
            axes.plot(x, y, linestyle=curve.line, **curve.style)
            if band:
                axes.fill_between(x, band[0], band[1], color=curve.style["color"], alpha=0.2, linewidth=0)
        peaks = [max(y for _, y, *_ in curve.points) for curve in curves]
        if min(peaks) > 0 and max(peaks) / min(peaks) > WIDE_RANGE:
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(lambda value, _: f"{value:,g}")
            axes.yaxis.set_minor_formatter(lambda *_: "")
        else:
            axes.set_ylim(0, None if top is None else top * 1.06)
        axes.set(xlabel=axes_names[0], ylabel=axes_names[1])
        axes.locator_params("x", nbins=8 if axes.get_xlim()[1] < 100 else 5)
        axes.grid(axis="y")
        keys = _keys(curves, named)
        return keys if plain is None else [*keys, _plain_line(axes.axhline, plain)]

    said = "; ".join(
        f"{f'{named[curve.profile][0]}, ' if len(named) > 1 else ''}{curve.kind}: "
        + " to ".join(f"{number(y)} at {x:,g}" for x, y, *_ in (curve.points[0], curve.points[-1]))
        for curve in curves
    )
    return _draw(title, f"Line plot: {axes_names[1]}, by {axes_names[0]}. {said}.", HEIGHT, draw)


def _keys(curves: list[PlotLine], named: Named) -> list[Artist]:
    """Return what the legend explains.

    It explains colours as profiles and lines as kinds, or both as kinds if there is one profile.
    """
    from matplotlib.lines import Line2D

    several = len(named) > 1
    profiles = {curve.profile: curve.style for curve in curves} if several else {}
    kinds = {curve.kind: (curve.line, {"color": "0.35"} if several else curve.style) for curve in curves}
    return [
        *(Line2D([], [], label=_short(named[i][0]), **style) for i, style in profiles.items()),
        *(Line2D([], [], label=kind, linestyle=line, **style) for kind, (line, style) in kinds.items()),
    ]


def _strategies(named: Named) -> Plot | None:
    """Bars of every strategy's speed over plain decoding, one colour a profile."""
    runs = {(run.name, i): run.ratio for i, (_, p) in enumerate(named) for run in p.strategies if not is_plain(run)}
    names = list(dict.fromkeys(name for name, _ in runs))
    if not runs:
        return None

    def draw(axes: Axes) -> list[Artist]:
        drawn: dict[int, Any] = {}
        furthest = max(1.0, *(estimate.high for estimate in runs.values()))
        at = 0.0
        for name in names:
            axes.text(furthest * 0.01, at, name, va="center", zorder=4, fontsize=10)
            for i, (profile_name, _) in enumerate(named):
                if estimate := runs.get((name, i)):
                    at += 1
                    sides = [[max(0.0, estimate.value - estimate.low)], [max(0.0, estimate.high - estimate.value)]]
                    label = _short(profile_name)
                    drawn[i] = axes.barh(at, estimate.value, 0.8, xerr=sides, color=f"C{i}", capsize=3, label=label)
                    axes.text(furthest * 1.17, at, f"{estimate.value:.2f}", va="center", ha="right", fontsize=10)
            at += 1.3
        axes.set_xlim(0, furthest * 1.17)
        axes.set_ylim(at - 0.7, -0.8)
        axes.set_yticks([])
        axes.set_xlabel("tokens/s ÷ plain, with 95 % intervals")
        line = _plain_line(axes.axvline, 1.0)
        return [*(drawn.values() if len(named) > 1 else ()), line]

    several = len(named) > 1
    said = "; ".join(
        f"{name}{f' on {named[i][0]}' if several else ''}: {e.value:.2f}, from {e.low:.2f} to {e.high:.2f}"
        for (name, i), e in runs.items()
    )
    height = 0.8 + 0.26 * (len(runs) + 1.3 * len(names))
    return _draw("Strategies against plain decoding", f"Bar plot: tokens/s ÷ plain. {said}.", height, draw)


def _plain_line(draw: Callable[..., Artist], at: float) -> Artist:
    return draw(at, color="0.25", linestyle="--", linewidth=1.2, zorder=3, label="plain decoding")


def _draw(title: str, description: str, height: float, draw: Callable[[Axes], list[Artist]]) -> Plot:
    """Return a figure of its own as SVG, its legend below it."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    drawn = draw(figure.add_subplot())
    labels = [str(artist.get_label()) for artist in drawn]
    columns = 2 if all(len(label) < 20 for label in labels) else 1
    figure.set_figheight(height + 0.2 * math.ceil(len(labels) / columns))
    figure.legend(drawn, labels, loc="outside lower center", ncols=columns, fontsize=10)
    file = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # names may be in any script: the browser draws the text
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    svg = file.getvalue()
    prefix = re.sub(r"\W+", "-", title.lower())  # what one plot calls its parts must not be found in another
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\g<1>{prefix}-", svg[svg.index("<svg") :])
    return Plot(title, description, svg)
