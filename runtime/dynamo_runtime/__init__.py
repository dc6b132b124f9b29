"""Run multi-token language models on the device: a bundle and a prompt in, text out."""

from .bundle import DEFAULT_BUNDLE, Bundle, load_bundle
from .device.profile import Profile
from .engine import Engine, Generation, TextStream
from .errors import BundleError, DynamoError, OutputError, ParameterError, ProfileError, PromptError, ProviderError
from .parameters import SamplingParameters
from .session import Session, Step
from .statistics import Statistics

__all__ = [
    "DEFAULT_BUNDLE",
    "Bundle",
    "BundleError",
    "DynamoError",
    "Engine",
    "Generation",
    "OutputError",
    "ParameterError",
    "Profile",
    "ProfileError",
    "PromptError",
    "ProviderError",
    "SamplingParameters",
    "Session",
    "Statistics",
    "Step",
    "TextStream",
    "load_bundle",
]
