"""Run multi-token language models on the device: a bundle and a prompt in, text out."""

import importlib
from typing import TYPE_CHECKING, Any

from .errors import (
    BundleError,
    DynamoError,
    EngineError,
    OutputError,
    ParameterError,
    ProfileError,
    PromptError,
    ProviderError,
)
from .version import __version__

if TYPE_CHECKING:
    from .bundle import DEFAULT_BUNDLE, Bundle, load_bundle
    from .conversation import Conversation
    from .device.profile import Profile
    from .drafting import NO_GUESS, NOTHING, Ask, Combined, Drafter, Guesses, Passed
    from .engine import Engine
    from .generation_statistics import Statistics
    from .lookup import Lookup
    from .origins import Origin, Span
    from .parameters import SamplingParameters
    from .providers import Backend
    from .registry import register_drafter
    from .sampling import Candidates, Context, LogitsProcessor
    from .session import Session
    from .step import ALL, LAST, NONE, All, At, Last, Step
    from .strategies import Auto, Autoregressive, Dynamo, Speculative, Strategy, Turn
    from .stream import Generation, TextStream
    from .topology import Topology
    from .verification import Draft

__all__ = [
    "ALL",
    "DEFAULT_BUNDLE",
    "LAST",
    "NONE",
    "NOTHING",
    "NO_GUESS",
    "All",
    "Ask",
    "At",
    "Auto",
    "Autoregressive",
    "Backend",
    "Bundle",
    "BundleError",
    "Candidates",
    "Combined",
    "Context",
    "Conversation",
    "Draft",
    "Drafter",
    "Dynamo",
    "DynamoError",
    "Engine",
    "EngineError",
    "Generation",
    "Guesses",
    "Last",
    "LogitsProcessor",
    "Lookup",
    "Origin",
    "OutputError",
    "ParameterError",
    "Passed",
    "Profile",
    "ProfileError",
    "PromptError",
    "ProviderError",
    "SamplingParameters",
    "Session",
    "Span",
    "Speculative",
    "Statistics",
    "Step",
    "Strategy",
    "TextStream",
    "Topology",
    "Turn",
    "__version__",
    "load_bundle",
    "register_drafter",
]

_MODULES = {
    "ALL": "step",
    "All": "step",
    "Ask": "drafting",
    "At": "step",
    "Auto": "strategies",
    "Autoregressive": "strategies",
    "Backend": "providers",
    "Bundle": "bundle",
    "Candidates": "sampling",
    "Combined": "drafting",
    "Context": "sampling",
    "Conversation": "conversation",
    "DEFAULT_BUNDLE": "bundle",
    "Draft": "verification",
    "Drafter": "drafting",
    "Dynamo": "strategies",
    "Engine": "engine",
    "Generation": "stream",
    "Guesses": "drafting",
    "LAST": "step",
    "Last": "step",
    "LogitsProcessor": "sampling",
    "Lookup": "lookup",
    "NONE": "step",
    "NOTHING": "drafting",
    "NO_GUESS": "drafting",
    "Origin": "origins",
    "Passed": "drafting",
    "Profile": "device.profile",
    "SamplingParameters": "parameters",
    "Session": "session",
    "Span": "origins",
    "Speculative": "strategies",
    "Statistics": "generation_statistics",
    "Step": "step",
    "Strategy": "strategies",
    "TextStream": "stream",
    "Topology": "topology",
    "Turn": "strategies",
    "load_bundle": "bundle",
    "register_drafter": "registry",
}


def __getattr__(name: str) -> Any:
    """Import numpy and all else only when it is needed: a command must be able to end before, and quietly."""
    if name in _MODULES:
        return getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
