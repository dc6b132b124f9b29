"""Two results files side by side."""

from __future__ import annotations

import math
from typing import Any

from dynamo_runtime.interval import Interval
from dynamo_runtime.tables import MISSING, Table

from .bootstrap import Draws, Quotient, interval
from .cells import AXES, MEASURES, SPEED, TOKENS_PER_PASS, Cells
from .errors import EvaluationError
from .perplexity_tables import Figures, change, figures
from .results import Results, flat
from .settings import PLAIN

_NOT_COMPARED = ("dynamo_eval", "command", "texts", "settings", "documents")


def compare_results(a: Results, b: Results) -> list[Table]:
    """Return what differs between two runs: what they were run on, and every figure that both have.

    Raises:
        EvaluationError: They are not of one kind, or have nothing in common.
    """
    kinds = [("texts" in each.header and "settings" in each.header) for each in (a, b)]
    if kinds[0] != kinds[1]:
        raise EvaluationError(f"{a.path} and {b.path} hold results of different commands")
    found = [_conditions(a, b), *(_generations(a, b) if kinds[0] else _perplexities(a, b))]
    return [table for table in found if table.rows]


def _conditions(a: Results, b: Results) -> Table:
    flat_a, flat_b = (flat(_described(each)) for each in (a, b))
    rows = [
        [name, str(flat_a.get(name, "")), str(flat_b.get(name, ""))]
        for name in dict.fromkeys([*flat_a, *flat_b])
        if flat_a.get(name) != flat_b.get(name)
    ]
    return Table("What differs", ["", "A", "B"], rows, cell_width=40)


def _described(results: Results) -> dict[str, Any]:
    """Return what is said of a run, and who has judged it since."""
    found = {name: value for name, value in results.header.items() if name not in _NOT_COMPARED}
    for name in ("judge", "features"):
        if said := sorted({record[name] for record in results.records if name in record}):
            found[name] = ", ".join(said)
    return found


def _generations(a: Results, b: Results) -> list[Table]:
    """Return every figure of the settings that both have, over the prompts that both have finished at as many seeds."""
    cells = Cells(a), Cells(b)
    names = [name for name in cells[0].settings if name in cells[1].settings]
    same = a.header["prompts"]["sha256"] == b.header["prompts"]["sha256"]
    if same:
        units = [unit for unit in cells[0].units if unit in cells[1].units]
        if not units:
            raise EvaluationError(f"{a.path} and {b.path} have finished no prompt in common")
        for each in cells:
            each.units = units
    if not names:
        raise EvaluationError(f"{a.path} and {b.path} have no setting in common")
    streams = (0, 0) if same else (0, 1)
    draws = [
        Draws.make([prompt for prompt, _ in each.units], each.seeds, stream)
        for each, stream in zip(cells, streams, strict=True)
    ]
    quotients = [{name: each.quotients(name) for name in names} for each in cells]
    rows = []
    for name in names:
        found = [each[name] for each in quotients]
        shared = [figure for figure in (TOKENS_PER_PASS, SPEED, *MEASURES) if all(figure in each for each in found)]
        rows.append([name])
        for figure in shared:
            of_plain = [each[PLAIN][SPEED] if figure == SPEED and name != PLAIN else None for each in quotients]
            values = [_relative(each[figure], plain) for each, plain in zip(found, of_plain, strict=True)]
            replicates = [
                _replicates(each[figure], plain, draw) for each, plain, draw in zip(found, of_plain, draws, strict=True)
            ]
            difference = interval(values[1] - values[0], replicates[1] - replicates[0])
            label = "tokens per second" if figure == SPEED and name == PLAIN else (AXES | MEASURES)[figure]
            rows.append([label, f"{values[0]:.3f}", f"{values[1]:.3f}", _signed(difference)])
    how = "paired" if same else "of different prompts, so not paired"
    return [Table(f"Figures ({how})", ["", "A", "B", "B − A"], rows, cell_width=30)]


def _relative(figure: Quotient, plain: Quotient | None) -> float:
    return figure.value / (1.0 if plain is None else plain.value)


def _replicates(figure: Quotient, plain: Quotient | None, draws: Draws) -> Any:
    replicates = figure.replicates(draws)
    return replicates if plain is None else replicates / plain.replicates(draws)


def _perplexities(a: Results, b: Results) -> list[Table]:
    """Return every perplexity of A's bundles over B's, in the order they were given, over common documents."""
    documents = [name for name in figures(a)[0].documents if name in figures(b)[0].documents]
    if not documents:
        raise EvaluationError(f"{a.path} and {b.path} have no text in common")
    rows = []
    for first, second in zip(figures(a, documents), figures(b, documents), strict=False):
        rows.append([_title(first, second)])
        for name, log in first.log_perplexities.items():
            if name in second.log_perplexities:
                other = second.log_perplexities[name]
                same = (log.bottom == other.bottom).all()
                if name == "PPL_1" and not same:
                    raise EvaluationError(
                        f"{a.path} and {b.path} score different positions: windows, and tokens ahead, must be the same"
                    )
                by = _ratio(change(other, log)) if same else MISSING  # of other words, which drafts are made of
                rows.append([name, _perplexity(log), _perplexity(other), by])
        for threshold, (log, speed) in first.dynamic.items():
            if threshold in second.dynamic:
                other, other_speed = second.dynamic[threshold]
                rows.append(
                    [f"PPL_d, ε_b {threshold}", _perplexity(log), _perplexity(other), _ratio(change(other, log))]
                )
                ratio = other_speed.value / speed.value
                cells = [f"{speed.value:.3f}", f"{other_speed.value:.3f}", f"{ratio:.4f}"]
                rows.append([f"tokens per pass, ε_b {threshold}", *cells])
    return [Table(f"Figures, over {len(documents)} texts", ["", "A", "B", "B ÷ A"], rows, cell_width=30)]


def _title(a: Figures, b: Figures) -> str:
    names = list(dict.fromkeys([a.bundle["name"], b.bundle["name"]]))
    return " against ".join(names)


def _perplexity(log: Quotient) -> str:
    return f"{math.exp(log.value):.3f}"


def _ratio(value: Interval) -> str:
    return f"{value.value:.4f} [{value.low:.4f}, {value.high:.4f}]"


def _signed(value: Interval) -> str:
    return f"{value.value:+.3f} [{value.low:+.3f}, {value.high:+.3f}]"
