"""What every test needs; some import onnxruntime themselves, which is to be as quiet as with the runtime."""

import functools
import gc
import sys
from collections.abc import Iterator

import pytest

from dynamo_runtime.quiet import hush

hush()


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own: nothing that is kept on this machine counts, and nothing of the tests is kept there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNAMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def pytest_collection_finish() -> None:
    """What all the imports made stays: no collection of garbage need look through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def one_table_of_operators() -> Iterator[None]:
    """`torch.onnx` makes its table of operators anew for every export, a tenth of what a tiny one takes."""
    with pytest.MonkeyPatch.context() as patch:
        if "torch" in sys.modules:
            from torch.onnx._internal.exporter._registration import ONNXRegistry

            patch.setattr(ONNXRegistry, "from_torchlib", staticmethod(functools.cache(ONNXRegistry.from_torchlib)))
        yield
