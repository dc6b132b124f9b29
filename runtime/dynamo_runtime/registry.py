"""Every way of predicting further tokens, and every drafter, by name: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from .drafting import Checked, Drafter
from .errors import ParameterError
from .joint import JointDrafter, JointHead
from .look_ahead import LookAhead, LookAheadDrafter
from .lookup import Lookup
from .parallel import ParallelDrafter, ParallelHeads
from .parameters import SamplingParameters
from .repeats import Occurrences
from .topology import Holder, Plain, Topology

MakeDrafter = Callable[[Holder, SamplingParameters], Drafter]

TOPOLOGIES: dict[str, type[Topology]] = {each.kind: each for each in (Plain, ParallelHeads, JointHead, LookAhead)}
"""What a bundle may hold, by kind."""

DRAFTERS: dict[str, MakeDrafter] = {
    ParallelHeads.kind: ParallelDrafter,
    JointHead.kind: JointDrafter,
    LookAhead.kind: LookAheadDrafter,
    Lookup.name: lambda bundle, parameters: Lookup(),
}
"""Drafters by name. One with the name of a topology reads what that puts out; any other needs nothing of a bundle."""

BOTH = "both"
"""Name of the bundle's own drafter and the text's, each where it expects more."""


class Sources(NamedTuple):
    """Where the drafts of one text come from: at least one of the two.

    Attributes:
        drafter: The bundle's own, or one of somebody's own.
        name: Its name.
        lookup: What the text repeats.
    """

    drafter: Drafter | None
    name: str
    lookup: Lookup | None


def register_drafter(name: str, make: MakeDrafter) -> None:
    """Make a drafter that needs nothing of the bundle known by a name, for `Engine.stream(…, drafter=name)`.

    Args:
        name: Not taken yet.
        make: From bundle and parameters to a drafter for one text.

    Raises:
        ParameterError: The name is taken.
    """
    if name in DRAFTERS or name in TOPOLOGIES or name == BOTH:
        raise ParameterError(f"there is a drafter {name!r} already")
    DRAFTERS[name] = make


def can_draft(bundle: Holder, drafter: str | Drafter | None = None) -> bool:
    """Tell whether there is a drafter besides the text itself: the one given, or the bundle's own."""
    return drafter is not None or bundle.topology.kind in DRAFTERS


def make_sources(
    bundle: Holder,
    parameters: SamplingParameters,
    drafter: str | Drafter | None = None,
    *,
    all_there_are: bool = False,
    corpus: Occurrences | None = None,
) -> Sources:
    """Return where the drafts of one text come from.

    Args:
        bundle: What runs.
        parameters: draft_tokens, and the target's.
        drafter: See `make_drafter`; "lookup" is the text alone, "both" that and the bundle's own. None is the bundle's
            own, or the text where it has none.
        all_there_are: Whether None is "both" where that can be, as it is with a corpus.
        corpus: Earlier texts, which "lookup" searches too.

    Raises:
        ParameterError: See `make_drafter`.
    """
    own = can_draft(bundle)
    if drafter is None:
        drafter = (BOTH if all_there_are or corpus is not None else bundle.topology.kind) if own else Lookup.name
    if drafter == BOTH and not own:
        raise ParameterError(f"drafter {BOTH} needs a bundle with a drafter, and this is a {bundle.topology.kind} one")
    lookup = Lookup(corpus) if drafter in (BOTH, Lookup.name) else None
    if corpus is not None and lookup is None:
        raise ParameterError(f"a draft corpus is for the drafters {Lookup.name} and {BOTH}")
    if drafter == Lookup.name:
        made, name = None, ""
    else:
        chosen = None if drafter == BOTH else drafter
        made = make_drafter(bundle, parameters, chosen)
        name = bundle.topology.kind if chosen is None else chosen if isinstance(chosen, str) else type(chosen).__name__
    most = max(each.depth for each in (made, lookup) if each is not None)
    if parameters.draft_tokens > most and "draft_tokens" in parameters.named:
        raise ParameterError(f"draft_tokens must be from 0 (all) to {most} here, not {parameters.draft_tokens}")
    return Sources(made, name, lookup)


def make_drafter(bundle: Holder, parameters: SamplingParameters, drafter: str | Drafter | None = None) -> Drafter:
    """Return the drafter for one text.

    Args:
        bundle: What runs.
        parameters: draft_tokens, and the target's.
        drafter: A name in `DRAFTERS`, or a drafter itself; None for the bundle's own.

    Raises:
        ParameterError: There is none.
    """
    kind = bundle.topology.kind
    name = kind if drafter is None else drafter
    if not isinstance(name, str):
        made: Drafter = Checked(name, bundle.vocab_size)
    elif name in DRAFTERS and name not in TOPOLOGIES:
        made = Checked(DRAFTERS[name](bundle, parameters), bundle.vocab_size)
    elif name in DRAFTERS and name == kind:
        made = DRAFTERS[name](bundle, parameters)
    elif drafter is None:
        raise ParameterError(f"this is a {kind} bundle, which has no drafter of its own")
    elif name in DRAFTERS:
        raise ParameterError(f"drafter {name} needs a bundle of that kind, and this is a {kind} one")
    else:
        raise ParameterError(f"unknown drafter {name!r}: there are {', '.join([*DRAFTERS, BOTH])}")
    return made
