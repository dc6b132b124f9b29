"""Run multi-token language models on the device: a bundle and a prompt in, text out."""

from .bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from .conversation import Conversation
from .device.profile import Profile
from .drafting import NO_GUESS, NOTHING, Ask, Combined, Drafter, Guesses, Passed
from .engine import Engine
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
from .parameters import SamplingParameters
from .providers import Backend
from .registry import register_drafter
from .sampling import Candidates, Context, LogitsProcessor
from .session import Session
from .statistics import Statistics
from .step import ALL, LAST, NONE, All, At, Last, Step
from .strategies import Auto, Autoregressive, Dynamo, Speculative, Strategy, Turn
from .stream import Generation, TextStream
from .topology import Topology
from .verification import Draft
from .version import __version__

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
    "OutputError",
    "ParameterError",
    "Passed",
    "Profile",
    "ProfileError",
    "PromptError",
    "ProviderError",
    "SamplingParameters",
    "Session",
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
