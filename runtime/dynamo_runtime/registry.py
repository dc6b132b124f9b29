"""Every way of predicting further tokens, and every drafter, by name: the one place that knows them all."""

from __future__ import annotations

from collections.abc import Callable

from .drafting import Checked, Drafter
from .errors import ParameterError
from .joint import JointDrafter, JointHead
from .look_ahead import LookAhead, LookAheadDrafter
from .parallel import ParallelDrafter, ParallelHeads
from .parameters import SamplingParameters
from .topology import Holder, Plain, Topology

MakeDrafter = Callable[[Holder, SamplingParameters], Drafter]

TOPOLOGIES: dict[str, type[Topology]] = {each.kind: each for each in (Plain, ParallelHeads, JointHead, LookAhead)}
"""What a bundle may hold, by kind."""

DRAFTERS: dict[str, MakeDrafter] = {
    ParallelHeads.kind: ParallelDrafter,
    JointHead.kind: JointDrafter,
    LookAhead.kind: LookAheadDrafter,
}
"""Drafters by name. One with the name of a topology reads what that puts out; any other needs nothing of a bundle."""


def register_drafter(name: str, make: MakeDrafter) -> None:
    """Make a drafter that needs nothing of the bundle known by a name, for `Engine.stream(…, drafter=name)`.

    Args:
        name: Not taken yet.
        make: From bundle and parameters to a drafter for one text.

    Raises:
        ParameterError: The name is taken.
    """
    if name in DRAFTERS or name in TOPOLOGIES:
        raise ParameterError(f"there is a drafter {name!r} already")
    DRAFTERS[name] = make


def can_draft(bundle: Holder, drafter: str | Drafter | None = None) -> bool:
    """Whether there is a drafter: the one given, or the bundle's own."""
    return drafter is not None or bundle.topology.kind in DRAFTERS


def make_drafter(bundle: Holder, parameters: SamplingParameters, drafter: str | Drafter | None = None) -> Drafter:
    """The drafter for one text.

    Args:
        bundle: What runs.
        parameters: draft_tokens, and the target's.
        drafter: A name in `DRAFTERS`, or a drafter itself; None for the bundle's own.

    Raises:
        ParameterError: There is none, or it does not give as many drafts as the caller asks for.
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
        raise ParameterError(f"strategy speculative needs a bundle with a drafter, and this is a {kind} one")
    elif name in DRAFTERS:
        raise ParameterError(f"drafter {name} needs a bundle of that kind, and this is a {kind} one")
    else:
        raise ParameterError(f"unknown drafter {name!r}: there are {', '.join(DRAFTERS)}")
    if parameters.draft_tokens > made.depth and "draft_tokens" in parameters.named:
        raise ParameterError(f"draft_tokens must be from 0 (all) to {made.depth} here, not {parameters.draft_tokens}")
    return made
