"""A bundle's graph in onnxruntime: bound buffers, and one forward pass at a time."""

import importlib.metadata
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np

from .bundle import Bundle
from .errors import BundleError, ParameterError, PromptError, ProviderError
from .kv_cache import GROWTH_SLOTS, KVCache

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
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
_CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
CP_OUTPUTS = ["gate", "factor_logits", "factor_topk_logits", "factor_topk_ids"]
_ERRORS_ONLY = 3  # below that onnxruntime warns at every load that initializers can be overridden


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


class Step:
    """What one forward pass says: per head, logits of the rows that were asked for.

    The arrays stay what they are whatever is run later. Full rows are views of onnxruntime's own
    memory, so that a sampler which is content with the top-k outputs does not pay for a vocabulary.
    """

    def __init__(self, arrays: dict[str, np.ndarray]):
        self._arrays = arrays

    def logits(self, head: int = 1) -> np.ndarray:
        """The full rows of one head, [rows, vocab]."""
        return self._arrays[_head_name("logits", head)]

    def topk(self, head: int = 1) -> tuple[np.ndarray, np.ndarray]:
        """The largest logits of one head and their token ids, both [rows, K], in descending order."""
        return self._arrays[_head_name("topk_logits", head)], self._arrays[_head_name("topk_ids", head)]

    def gate(self) -> np.ndarray:
        """Of a joint head: log w_α of its components, [rows, rank]."""
        return self._arrays["gate"]

    def factors(self) -> np.ndarray:
        """Of a joint head: logits of every factor p_α^(s), [rows, n_tokens, rank, vocab]."""
        return self._arrays["factor_logits"]

    def factor_topk(self) -> tuple[np.ndarray, np.ndarray]:
        """Of a joint head: every factor's largest logits and their ids, both [rows, n_tokens, rank, K], descending."""
        return self._arrays["factor_topk_logits"], self._arrays["factor_topk_ids"]


class Session:
    """The graph of one bundle with its KV cache.

    Attributes:
        bundle: What is running.
        cache: The KV cache; `cache.rollback(length)` before a step drops positions.
        ort_seconds: Time spent inside onnxruntime so far.
        passes: Forward passes so far.
        user: Whoever relies on what the cache holds.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        provider: str = "auto",
        threads: int | None = None,
        max_length: int | None = None,
        growth: int = GROWTH_SLOTS,
    ):
        """Load the graph and check that it keeps the contract of the manifest.

        Args:
            bundle: From `load_bundle`, or built in memory.
            provider: "cpu", "cuda", or "auto" (cuda where it is available and the bundle is half precision).
            threads: Threads within an operator; None leaves it to onnxruntime.
            max_length: Largest number of positions the cache may hold; None means the bundle's context
                length.
            growth: Cache slots per growth step.

        Raises:
            ProviderError: No usable onnxruntime or execution provider.
            ParameterError: `threads` or `max_length` out of range.
            BundleError: The graph does not load or is not what the manifest says.
        """
        if threads is not None and threads < 1:
            raise ParameterError(f"threads must be at least 1, not {threads}")
        length = bundle.context_length if max_length is None else max_length
        if not 1 <= length <= bundle.context_length:
            raise ParameterError(
                f"max_length must be from 1 to the context length {bundle.context_length}, not {length}"
            )
        self.bundle = bundle
        self.ort_seconds = 0.0
        self.passes = 0
        self.user: object = None
        self._ort = import_onnxruntime()
        self._device, providers = _choose_provider(self._ort, provider, bundle.precision)
        options = self._ort.SessionOptions()
        options.log_severity_level = _ERRORS_ONLY
        options.add_session_config_entry("session.force_spinning_stop", "1")  # else idle threads burn CPU after a run
        if threads is not None:
            options.intra_op_num_threads = threads
        if not bundle.graph_path.is_file():
            raise BundleError(f"{bundle.graph_path} is missing")
        try:
            self._session = self._ort.InferenceSession(str(bundle.graph_path), options, providers=providers)
        except Exception as error:  # onnxruntime raises many classes that share no base
            raise BundleError(f"{bundle.graph_path} does not load: {error}") from error
        if self._session.get_providers()[0] != providers[0]:
            raise ProviderError(f"execution provider {provider} is installed but could not be started on this machine")
        inputs = self._check_contract()
        self.cache = KVCache(
            bundle.kv_layers,
            bundle.kv_heads,
            bundle.head_size,
            length,
            dtype=_CACHE_TYPES[inputs["past_key_values.0.key"].type],
            growth=growth,
        )
        self._ones = np.ones(length, np.int64)
        self._rows = np.zeros((), np.int64)
        self._last_row = np.array([-1], np.int64)
        self._names = [
            _head_name(name, head)
            for head in range(1, bundle.n_heads + 1)
            for name in ("logits", "topk_logits", "topk_ids")
        ]
        if bundle.kind == "cp":
            self._names += CP_OUTPUTS
        # Copying K numbers is faster than making a view of them; copying a vocabulary is not.
        self._read = {name: _view if name.startswith(("logits", "factor_logits")) else _copy for name in self._names}
        self._binding = self._session.io_binding()
        self._bind_all()

    @property
    def max_length(self) -> int:
        """Largest number of positions the cache may hold."""
        return self.cache.max_length

    def step(self, tokens: Sequence[int], *, rows: int = 1, head_rows: Sequence[int] | None = None) -> Step:
        """Run the graph over `tokens`, appended to what the cache holds, and advance the cache by them.

        Args:
            tokens: m >= 1 ids of tokens, or of look-ahead tokens.
            rows: Last rows of the first head to return; 0 means all m.
            head_rows: Rows of this pass (0 … m-1, or negative from the end) to return of every further head;
                None means the last.

        Raises:
            PromptError: No tokens, a token outside the vocabulary, or more than the cache may hold.
            BundleError: The graph does not run.
            ValueError: `rows` or `head_rows` are not among the m rows.
        """
        m = len(tokens)
        if m == 0:
            raise PromptError("there are no tokens to process")
        if min(tokens) < 0 or max(tokens) >= self.bundle.look_ahead.stop:
            raise PromptError(f"token ids must be from 0 to {self.bundle.look_ahead.stop - 1}")
        if not 0 <= rows <= m:
            raise ValueError(f"rows {rows} of a pass over {m} tokens")
        if head_rows is not None and not all(-m <= row < m for row in head_rows):
            raise ValueError(f"head_rows {list(head_rows)} of a pass over {m} tokens")
        total = self.cache.length + m
        if self.cache.reserve(total):
            self._bind_cache()
        ids = np.array(tokens, np.int64)
        further = self._last_row if head_rows is None else np.array(head_rows, np.int64)
        self._rows[()] = rows
        self._bind_input("input_ids", ids, (1, m))
        self._bind_input("attention_mask", self._ones, (1, total))
        if self.bundle.has_head_rows:
            self._bind_input("head_rows", further, further.shape)
        for name in self._names:  # rebinding tells onnxruntime to allocate anew, so an earlier Step keeps its arrays
            self._binding.bind_output(name)
        started = time.perf_counter()
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises many classes that share no base
            raise BundleError(f"{self.bundle.graph_path} fails at a pass over {m} tokens: {error}") from error
        self.ort_seconds += time.perf_counter() - started
        self.passes += 1
        self.cache.advance(tokens)
        outputs = self._binding.get_outputs_as_ortvaluevector()
        return Step({name: self._read[name](outputs[index])[0] for index, name in enumerate(self._names)})

    def _bind_all(self) -> None:
        for name in self._names:  # first, so that their places in the output vector are those in `_names`
            self._binding.bind_output(name)
        self._bind_input("num_logits_to_keep", self._rows, ())
        self._bind_cache()

    def _bind_cache(self) -> None:
        for layer, pair in enumerate(self.cache.buffers):
            for part, buffer in zip(("key", "value"), pair, strict=True):
                self._bind_input(f"past_key_values.{layer}.{part}", buffer, buffer.shape)
                self._binding.bind_output(
                    f"present.{layer}.{part}", "cpu", 0, buffer.dtype.type, buffer.shape, buffer.ctypes.data
                )

    def _bind_input(self, name: str, array: np.ndarray, shape: tuple[int, ...]) -> None:
        # Binds memory, not an array: the caller keeps `array` alive until the run is over.
        self._binding.bind_input(name, "cpu", 0, array.dtype.type, shape, array.ctypes.data)

    def _check_contract(self) -> dict[str, Any]:
        """Compare names, types and sizes with the manifest; returns the graph's inputs by name."""
        bundle, path = self.bundle, self.bundle.graph_path
        arguments = [*self._session.get_inputs(), *self._session.get_overridable_initializers()]
        inputs = {argument.name: argument for argument in arguments}
        outputs = {argument.name: argument for argument in self._session.get_outputs()}
        cache = [f"{layer}.{part}" for layer in range(bundle.kv_layers) for part in ("key", "value")]
        heads = range(1, bundle.n_heads + 1)
        needed_inputs = [
            "input_ids",
            "attention_mask",
            "num_logits_to_keep",
            *(f"past_key_values.{name}" for name in cache),
        ]
        if bundle.has_head_rows:
            needed_inputs.append("head_rows")
        for head in heads:
            name = _head_name("logits", head)
            if name not in outputs:
                raise BundleError(f"{path} has no output {name}: head {head} of {bundle.n_heads} is missing")
        needed_outputs = [_head_name(name, head) for head in heads for name in ("topk_logits", "topk_ids")]
        needed_outputs += CP_OUTPUTS if bundle.kind == "cp" else []
        needed_outputs += [f"present.{name}" for name in cache]
        for kind, needed, present in (("input", needed_inputs, inputs), ("output", needed_outputs, outputs)):
            for name in needed:
                if name not in present:
                    raise BundleError(f"{path} has no {kind} {name}: it is not the graph its manifest describes")
        unknown = [i.name for i in self._session.get_inputs() if i.name not in needed_inputs]
        if unknown:
            raise BundleError(f"{path} has an input {unknown[0]} that its manifest does not account for")
        if inputs["past_key_values.0.key"].type not in _CACHE_TYPES:
            raise BundleError(
                f"{path} keeps its cache as {inputs['past_key_values.0.key'].type}, which is not supported"
            )
        sizes = [(_head_name("logits", head), -1, bundle.vocab_size, "vocabulary") for head in heads]
        sizes += [(_head_name("topk_ids", head), -1, bundle.top_k_outputs, "top_k_outputs") for head in heads]
        if bundle.kind == "cp":
            sizes += [(name, -2, bundle.rank, "rank") for name in CP_OUTPUTS[1:]] + [("gate", -1, bundle.rank, "rank")]
            sizes += [(name, -3, bundle.n_tokens, "n_tokens") for name in CP_OUTPUTS[1:]]
            sizes += [("factor_logits", -1, bundle.vocab_size, "vocabulary")]
            sizes += [("factor_topk_ids", -1, bundle.top_k_outputs, "top_k_outputs")]
        sizes += [(f"present.{name}", 1, bundle.kv_heads, "kv_heads") for name in cache]
        sizes += [(f"present.{name}", 3, bundle.head_size, "head_size") for name in cache]
        for name, axis, size, what in sizes:
            shape = outputs[name].shape
            found = shape[axis] if shape else None
            if isinstance(found, int) and found != size:  # a named axis says nothing
                raise BundleError(f"{path}: output {name} has a {what} of {found} where the manifest says {size}")
        return inputs


def _copy(value: Any) -> np.ndarray:
    array: np.ndarray = value.numpy()
    return array


def _view(value: Any) -> np.ndarray:
    """An array over the memory of an OrtValue, which lives as long as the array."""
    array: np.ndarray = np.from_dlpack(value) if hasattr(value, "__dlpack__") else _copy(value)
    return array


def _head_name(name: str, head: int) -> str:
    """Output name of one head: the first has none of the suffixes `_2`, `_3`, …."""
    return name if head == 1 else f"{name}_{head}"


def _choose_provider(ort: ModuleType, provider: str, precision: str) -> tuple[str, list[str]]:
    """Device name and provider list for onnxruntime."""
    if provider not in ("auto", *PROVIDERS):
        raise ProviderError(f"unknown execution provider {provider!r}: choose auto, {', '.join(PROVIDERS)}")
    available = ort.get_available_providers()
    if provider == "auto":
        # CUDA's attention kernels are half precision only: an fp32 graph would go back and forth at every
        # layer.
        half = precision in ("fp16", "bf16")
        provider = "cuda" if half and PROVIDERS["cuda"] in available else "cpu"
    if PROVIDERS[provider] not in available:
        raise ProviderError(
            f"execution provider {provider} is not in the installed onnxruntime, which has "
            f"{', '.join(name.removesuffix('ExecutionProvider').lower() for name in available)}"
        )
    return provider, list(dict.fromkeys([PROVIDERS[provider], PROVIDERS["cpu"]]))
