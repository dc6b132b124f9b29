"""What every test needs; some import onnxruntime themselves, which is to be as quiet as with the runtime."""

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
