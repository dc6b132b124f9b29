"""Which strategy runs: the one of a name, on a bundle and a device, with the parameters that it reads."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from .bundle import Bundle
from .device.costs import Knowledge
from .drafting import Ask, Drafter
from .errors import ParameterError
from .parameters import PAPER, SamplingParameters, check_kind
from .repeats import Occurrences
from .sampling import LogitsProcessor
from .strategies import Auto, Autoregressive, Dynamo, Speculative, Strategy

STRATEGIES: dict[str, type[Autoregressive] | type[Dynamo] | type[Speculative]] = {
    strategy.name: strategy for strategy in (Auto, Autoregressive, Dynamo, Speculative)
}


def parameters_for(
    name: str, bundle: Bundle, given: Mapping[str, Any] | None = None, parameters: SamplingParameters | None = None
) -> SamplingParameters:
    """Return the parameters that a strategy runs with on a bundle.

    What the caller does not name is the bundle's, or of `parameters` in place of that. `dynamo` is the paper's
    algorithm and has the paper's: of bundle and `parameters` it takes only what a caller named.

    Args:
        name: Of the strategy.
        bundle: What it is to run on.
        given: What the caller named.
        parameters: In place of the bundle's defaults.

    Raises:
        ParameterError: There is no such strategy, a name is unknown, or a value is out of range.
    """
    if _named(name) is not Dynamo:
        return bundle.parameters(given, parameters)
    named = {} if parameters is None else {each: getattr(parameters, each) for each in parameters.named}
    named |= {each: value for each, value in (given or {}).items() if value is not None}
    return bundle.parameters(named, PAPER)


def make_strategy(
    name: str,
    bundle: Bundle,
    parameters: SamplingParameters,
    processors: Sequence[LogitsProcessor] = (),
    *,
    drafter: str | Drafter | None = None,
    knowledge: Knowledge | None = None,
    corpus: Occurrences | None = None,
) -> Strategy:
    """Return a strategy by name.

    Args:
        name: One of `STRATEGIES`. "auto" is "autoregressive" where nothing can be drafted without changing the text: on
            bundles that say so, and on devices where the width test failed.
        bundle: What it runs on.
        parameters: Of all strategies.
        processors: Of the logits.
        drafter: For "auto" and "speculative": see `Speculative`.
        knowledge: Of the device, for "auto".
        corpus: Earlier texts, for the drafters "lookup" and "both".

    Raises:
        ParameterError: There is none of that name, or it does not fit the bundle or the parameters.
    """
    strategy = _running(name, bundle, knowledge)
    if issubclass(strategy, Auto):
        return strategy(bundle, parameters, processors, drafter, knowledge, corpus)
    if issubclass(strategy, Speculative):
        return strategy(bundle, parameters, processors, drafter, corpus)
    if drafter is not None:
        raise ParameterError(f"strategy {name} drafts nothing on this bundle: it takes no drafter")
    return strategy(bundle, parameters, processors)


def is_lossless(bundle: Bundle, knowledge: Knowledge | None) -> bool:
    """Tell whether verified text is that of plain decoding, by the bundle and as far as the device was tested."""
    return bundle.lossless and (knowledge is None or knowledge.widths_hold)


def _running(
    name: str, bundle: Bundle, knowledge: Knowledge | None
) -> type[Autoregressive] | type[Dynamo] | type[Speculative]:
    """Return the strategy that runs under a name; "auto" is plain decoding where drafts would change the text."""
    strategy = _named(name)
    if issubclass(strategy, Auto) and not is_lossless(bundle, knowledge):
        return Autoregressive
    return strategy


def refusal(
    name: str, bundle: Bundle, given: Mapping[str, Any] | None = None, drafter: str | Drafter | None = None
) -> str | None:
    """Say why a strategy cannot run on a bundle; None if it can.

    Args:
        name: Of the strategy.
        bundle: What is to run.
        given: Sampling parameters that the caller names.
        drafter: See `make_strategy`.
    """
    try:
        make_strategy(name, bundle, parameters_for(name, bundle, given), drafter=drafter)
    except ParameterError as error:
        return str(error)
    return None


def check_reads(name: str, named: Collection[str], bundle: Bundle, knowledge: Knowledge | None = None) -> None:
    """See that a strategy reads what the caller named: what it does not read would silently do nothing.

    Args:
        name: Of the strategy.
        named: Names of parameters.
        bundle: What it is to run on.
        knowledge: Of the device.

    Raises:
        ParameterError: There is no such strategy, or it does not read one of them.
    """
    running = _running(name, bundle, knowledge)
    for unread in sorted(set(named) - set(running.reads)):
        readers = [each.name for each in STRATEGIES.values() if unread in each.reads]
        if name in readers:
            raise ParameterError(f"strategy {name} cannot draft on this bundle, so {unread} would do nothing")
        if readers:  # else nobody knows it, which is told elsewhere
            raise ParameterError(f"strategy {name} does not read {unread}: it is for {' and '.join(readers)}")


def read_by(name: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a strategy reads of some parameters: for one side of a comparison.

    Args:
        name: Of the strategy.
        given: Parameters by name, perhaps of several strategies.
    """
    return {parameter: value for parameter, value in given.items() if parameter in _named(name).reads}


def check_own(strategy: Strategy) -> Strategy:
    """Return a strategy of somebody's own.

    Raises:
        ParameterError: It does not have what a `Strategy` has.
    """
    kind = type(strategy).__name__
    if isinstance(strategy, type):
        raise ParameterError(f"a strategy of your own is an object, not the class {strategy.__name__}")
    for needed in ("name", "ask", "advance"):
        if not hasattr(strategy, needed):
            raise ParameterError(f"a strategy is a name, or has name, ask and advance, and {kind} has no {needed}")
    check_kind(f"name of strategy {kind}", strategy.name, str, "text")
    check_kind(f"ask of strategy {kind}", strategy.ask, Ask, "an Ask")
    return strategy


def _named(name: str) -> type[Autoregressive] | type[Dynamo] | type[Speculative]:
    if name not in STRATEGIES:
        raise ParameterError(f"unknown strategy {name!r}: choose {' or '.join(STRATEGIES)}")
    return STRATEGIES[name]
