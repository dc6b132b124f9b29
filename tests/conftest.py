"""What every test needs."""

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own: nothing that is kept on this machine counts, and nothing of the tests is kept there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DYNAMO_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
