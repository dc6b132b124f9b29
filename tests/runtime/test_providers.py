"""Up to the provider's boundary: what is asked of onnxruntime, and what happens when it cannot do it."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from dynamo_runtime import ALL, Session, load_bundle, providers
from dynamo_runtime.errors import BundleError, ParameterError, ProviderError
from dynamo_runtime.providers import Backend
from dynamo_runtime.wire import without_ends

CPU, CUDA = "CPUExecutionProvider", "CUDAExecutionProvider"


class FakeRuntime(SimpleNamespace):
    """An onnxruntime with a CUDA provider, which may or may not start."""

    def __init__(self, cuda_starts: bool = True, error: str = "") -> None:
        super().__init__(loaded=[])
        self.SessionOptions = onnxruntime.SessionOptions
        self.GraphOptimizationLevel = onnxruntime.GraphOptimizationLevel
        self.cuda_starts, self.error = cuda_starts, error

    def get_available_providers(self) -> list[str]:
        return [CUDA, CPU]

    def get_all_providers(self) -> list[str]:
        return [CUDA, "CoreMLExecutionProvider", CPU]

    def InferenceSession(self, model: Any, options: Any, providers: list[Any]) -> SimpleNamespace:
        names = [each if isinstance(each, str) else each[0] for each in providers]
        self.loaded.append((model, options, providers))
        if self.error:
            raise RuntimeError(self.error)
        running = names if self.cuda_starts else [CPU]
        return SimpleNamespace(get_providers=lambda: running)


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    (tmp_path / "model.onnx").write_bytes(b"")
    return tmp_path / "model.onnx"


def installed(monkeypatch: pytest.MonkeyPatch, **options: Any) -> FakeRuntime:
    fake = FakeRuntime(**options)
    monkeypatch.setattr(providers, "import_onnxruntime", lambda: fake)
    return fake


def test_auto_takes_cuda_for_half_precision_alone(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    fake = installed(monkeypatch)
    assert [Backend().start(graph, precision)[1] for precision in ("fp16", "fp32", "int8", "int4")] == [
        "cuda",
        "cpu",
        "cpu",
        "cpu",
    ]
    assert [load[2] for load in fake.loaded[:2]] == [[(CUDA, {}), CPU], [CPU]]


def test_a_fallback_is_said_aloud(
    monkeypatch: pytest.MonkeyPatch, graph: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fake = installed(monkeypatch, cuda_starts=False)
    assert Backend().start(graph, "fp16")[1] == "cpu"
    assert "cuda could not be started on this machine: going on with cpu" in caplog.text
    assert [load[2] for load in fake.loaded] == [[(CUDA, {}), CPU], [CPU]]
    with pytest.raises(ProviderError, match="cuda is in the installed onnxruntime but does not start"):
        Backend(provider="cuda").start(graph, "fp16")


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4", "int8-dynamic"])
def test_cuda_refuses_what_its_attention_cannot_run(
    precision: str, monkeypatch: pytest.MonkeyPatch, graph: Path
) -> None:
    installed(monkeypatch)
    with pytest.raises(ProviderError, match=r"dynamo-export -m FP32-BUNDLE .* --quantize fp16"):
        Backend(provider="cuda").start(graph, precision)


def test_an_absent_provider_is_an_error(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    installed(monkeypatch)
    with pytest.raises(ProviderError, match="coreml is not in the installed onnxruntime, which has cuda, cpu"):
        Backend(provider="coreml").start(graph, "fp16")
    with pytest.raises(
        ProviderError, match=r"unknown execution provider 'tpu': choose auto or one of coreml, cpu, cuda"
    ):
        Backend(provider="tpu").start(graph, "fp16")


def test_options_reach_onnxruntime(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    fake = installed(monkeypatch)
    backend = Backend("cuda", {"device_id": "1"}, threads=3, optimization="basic", profile_prefix="/tmp/x")
    backend.start(graph, "fp16")
    _, options, given = fake.loaded[0]
    assert given == [(CUDA, {"device_id": "1"}), CPU]
    assert options.intra_op_num_threads == 3
    assert options.graph_optimization_level == onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    assert options.enable_profiling and options.profile_file_prefix == "/tmp/x"
    assert options.get_session_config_entry("session.force_spinning_stop") == "1"


def test_what_onnxruntime_complains_of_is_passed_on(monkeypatch: pytest.MonkeyPatch, graph: Path) -> None:
    installed(monkeypatch, error="[ONNXRuntimeError] : 11 : EP_FAIL : CUDA failure 100: no CUDA-capable device")
    with pytest.raises(ProviderError, match=r"cuda could not be started: .*no CUDA-capable device"):
        Backend("cuda").start(graph, "fp16")
    with pytest.raises(BundleError, match="does not load"):
        Backend("cpu").start(graph, "fp16")


def test_wrong_settings() -> None:
    for wrong in ({"threads": 0}, {"optimization": "most"}, {"provider_options": {"a": "b"}}):
        with pytest.raises(ParameterError):
            Backend(**wrong)  # type: ignore[arg-type]


def test_optimization_changes_no_number(multi: Path) -> None:
    tokens = [7, 30, 111, 250]
    expected = Session(load_bundle(multi), threads=1).step(tokens, rows=ALL).logits()
    for level in ("basic", "none"):
        found = Session(load_bundle(multi), threads=1, optimization=level).step(tokens, rows=ALL).logits()
        assert abs(found - expected).max() < 2e-5


def test_inputs_and_outputs_are_cut_out_of_a_model() -> None:
    """With what depends on such an input, whether there is a value for it or not; what nobody wants may stay."""
    names = ("a", "b", "c", "out", "same", "other")
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in names]
    weights = [helper.make_tensor(name, TensorProto.FLOAT, [2], [1.0, 2.0]) for name in ("b", "c")]
    nodes = [helper.make_node("Sum", ["a", "c"], ["out"]), helper.make_node("Identity", ["b"], ["middle"])]
    nodes += [helper.make_node("Identity", ["middle"], ["other"]), helper.make_node("Identity", ["out"], ["same"])]
    model = helper.make_model(helper.make_graph(nodes, "g", values[:3], values[3:], weights), ir_version=10)
    cut = onnx.ModelProto.FromString(without_ends(model.SerializeToString(), ["b", "same", "other", "nowhere"]))
    assert [value.name for value in cut.graph.input] == ["a", "c"]
    del model.graph.input[1], model.graph.output[1:], model.graph.node[1:3]
    assert cut == model
