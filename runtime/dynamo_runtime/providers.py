"""Where a graph runs: onnxruntime itself, its execution providers, and the options of a session."""

import importlib.metadata
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from types import ModuleType, NoneType
from typing import Any, TypedDict

from .errors import BundleError, ParameterError, ProviderError
from .loading import fast_loading
from .parameters import check_kind, whole
from .quiet import hush
from .wire import without_ends

# Distributions that install the module `onnxruntime`: two of them overwrite each other's files.
_DISTRIBUTIONS = (
    "onnxruntime",
    "onnxruntime-gpu",
    "onnxruntime-directml",
    "onnxruntime-openvino",
    "onnxruntime-qnn",
    "onnxruntime-rocm",
    "onnxruntime-migraphx",
    "onnxruntime-training",
)
_SUFFIX = "ExecutionProvider"
OPTIMIZATIONS = {"all": "ORT_ENABLE_ALL", "extended": "ORT_ENABLE_EXTENDED", "basic": "ORT_ENABLE_BASIC"}
OPTIMIZATIONS |= {"none": "ORT_DISABLE_ALL"}
HALF_PRECISIONS = ("fp16", "bf16")
_WEIGHTS_FOLDER = "session.model_external_initializers_file_folder_path"  # of a graph that is not loaded by name
_THREADS_A_CORE, _THREADS_ANYWHERE = 4, 16  # more only wait for one another, and onnxruntime makes them all
_ERRORS_ONLY = 3  # below that onnxruntime warns at every load that initializers can be overridden

log = logging.getLogger("dynamo_runtime")


def import_onnxruntime() -> ModuleType:
    """Import onnxruntime, if exactly one distribution of it is installed.

    Raises:
        ProviderError: There is none, there are several, or it does not load.
    """
    installed = [name for name in _DISTRIBUTIONS if _is_installed(name)]
    if len(installed) > 1:
        raise ProviderError(
            f"{' and '.join(installed)} are both installed and overwrite each other: "
            "uninstall them all, then install exactly one"
        )
    hush()
    try:
        import onnxruntime
    except ImportError as error:
        if installed:
            raise ProviderError(f"{installed[0]} is installed but does not load: {error}") from error
        raise ProviderError(
            "onnxruntime is not installed: install dynamo-edge[cpu], or dynamo-edge[gpu] for an NVIDIA GPU"
        ) from error
    return onnxruntime


def _is_installed(distribution: str) -> bool:
    try:
        importlib.metadata.distribution(distribution)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def cores() -> int:
    """Return logical cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Backend:
    """How a graph is to be run.

    Attributes:
        provider: Execution provider by its short name ("cpu", "cuda", …), or "auto": cuda where it works and the
            bundle is in half precision, else cpu.
        provider_options: Options of that provider, as onnxruntime names them.
        threads: Threads within an operator; None leaves it to onnxruntime.
        optimization: Graph optimizations: "all", "extended", "basic" or "none".
        profile_prefix: Where onnxruntime writes the times of its operators; None for nowhere.
    """

    provider: str = "auto"
    provider_options: Mapping[str, str] = field(default_factory=dict)
    threads: int | None = None
    optimization: str = "all"
    profile_prefix: str | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without onnxruntime.

        Raises:
            ParameterError: A field is of the wrong type, `threads` or `optimization` is out of range, or options are
                given for no provider.
        """
        if self.threads is not None:
            object.__setattr__(self, "threads", whole("threads", self.threads, 1))
            most = max(_THREADS_A_CORE * cores(), _THREADS_ANYWHERE)
            if self.threads > most:
                raise ParameterError(f"threads must be at most {most} on {cores()} cores, not {self.threads}")
        for name in ("provider", "optimization"):
            check_kind(name, getattr(self, name), str, "text")
        check_kind("provider_options", self.provider_options, Mapping, "a mapping")
        check_kind("profile_prefix", self.profile_prefix, (str, NoneType), "text")
        if self.optimization not in OPTIMIZATIONS:
            raise ParameterError(f"optimization must be one of {', '.join(OPTIMIZATIONS)}, not {self.optimization!r}")
        if self.provider_options and self.provider == "auto":
            raise ParameterError("provider options need a provider: auto may choose one that does not know them")
        if self.provider_options and self.provider == "cpu":
            raise ParameterError("provider cpu has no options")

    def start(self, graph: Path, precision: str, without: Sequence[str] = ()) -> tuple[Any, str]:
        """Load a graph.

        Args:
            graph: The ONNX file.
            precision: The bundle's.
            without: Inputs that are not given, and outputs that nobody wants: a part of the graph is left.

        Returns:
            The `InferenceSession`, and the short name of the provider that runs it.

        Raises:
            ProviderError: There is no usable onnxruntime, or not that provider, or it cannot run such a bundle.
            BundleError: The graph does not load.
        """
        ort = import_onnxruntime()
        name = self._choose(ort, precision, graph.parent)
        if not graph.is_file():
            raise BundleError(f"{graph} is missing")
        session = self._load(ort, graph, name, without)
        if _short(session.get_providers()[0]) != name:
            if self.provider != "auto":
                raise ProviderError(
                    f"execution provider {name} is in the installed onnxruntime but does not start on this machine"
                )
            log.warning("execution provider %s could not be started on this machine: going on with cpu", name)
            name = "cpu"
            session = self._load(ort, graph, name, without)
        return session, name

    def _load(self, ort: ModuleType, graph: Path, name: str, without: Sequence[str]) -> Any:
        options = ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.graph_optimization_level = getattr(ort.GraphOptimizationLevel, OPTIMIZATIONS[self.optimization])
        # A graph's threads that go on spinning behind a pass take the cores from the drafter's graph.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        if self.threads is not None:
            options.intra_op_num_threads = self.threads
        if self.profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = self.profile_prefix
        wanted = next(full for full in ort.get_available_providers() if _short(full) == name)
        providers: list[Any] = [(wanted, dict(self.provider_options))] if name != "cpu" else []
        try:
            model: str | bytes = str(graph)
            if without:
                options.add_session_config_entry(_WEIGHTS_FOLDER, str(graph.parent))
                model = without_ends(graph.read_bytes(), without)
            with fast_loading():
                return ort.InferenceSession(model, options, providers=[*providers, f"CPU{_SUFFIX}"])
        except Exception as error:  # onnxruntime raises many classes that share no base
            if name != "cpu" and "EP_FAIL" in str(error):
                raise ProviderError(f"execution provider {name} could not be started: {error}") from error
            raise BundleError(f"{graph} does not load: {error}") from error

    def _choose(self, ort: ModuleType, precision: str, folder: Path) -> str:
        available = [_short(name) for name in ort.get_available_providers()]
        half = precision in HALF_PRECISIONS
        if self.provider == "auto":
            return "cuda" if half and "cuda" in available else "cpu"
        known = {"cpu", "cuda", *map(_short, ort.get_all_providers())}
        if self.provider not in known:
            raise ProviderError(
                f"unknown execution provider {self.provider!r}: choose auto or one of {', '.join(sorted(known))}"
            )
        if self.provider not in available:
            raise ProviderError(
                f"execution provider {self.provider} is not in the installed onnxruntime, which has "
                f"{', '.join(available)}"
            )
        # CUDA's attention kernels compute in half precision only.
        if self.provider == "cuda" and not half:
            raise ProviderError(
                f"{folder} is {precision}, and on provider cuda attention runs in fp16 only: make a bundle for it from "
                "the fp32 one with `dynamo-export -m FP32-BUNDLE GPU/model.onnx --quantize fp16`"
            )
        return self.provider


class BackendOptions(TypedDict, total=False):
    """The fields of `Backend` as keywords."""

    provider: str
    provider_options: Mapping[str, str]
    threads: int | None
    optimization: str
    profile_prefix: str | None


def backend_of(backend: Backend | None, options: BackendOptions) -> Backend:
    """Return a backend with some fields put in place of its own.

    Raises:
        ParameterError: A field is unknown or out of range.
    """
    check_kind("backend", backend, (Backend, NoneType), "a Backend")
    names = [each.name for each in fields(Backend)]
    if unknown := sorted(set(options) - set(names)):
        raise ParameterError(f"unknown option {unknown[0]} of the backend; there are {', '.join(names)}")
    return replace(backend or Backend(), **options)


def _short(name: str) -> str:
    return name.removesuffix(_SUFFIX).lower()
