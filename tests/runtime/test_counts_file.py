"""N-gram counts that come from anywhere: sizes and types are judged before an array is read."""

import io
import time
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import handmade

from dynamo_runtime import BundleError
from dynamo_runtime.cooccurrence import load_cooccurrence

V = 20


def npy(array: Any) -> bytes:
    file = io.BytesIO()
    np.lib.format.write_array(file, np.asarray(array), allow_pickle=True)
    return file.getvalue()


def whole() -> dict[str, bytes]:
    """The members of a table of pairs."""
    arrays = {"totals": [9, 9], "counts_1": [1] * V, "offsets_2": [0] + [1] * V, "ids_2": [1], "counts_2": [3]}
    return {f"{name}.npy": npy(array) for name, array in arrays.items()}


def write(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def test_the_table_itself_is_read(tmp_path: Path) -> None:
    assert load_cooccurrence(write(tmp_path / "counts.npz", whole()), V).orders == 2


DAMAGES: dict[str, tuple[dict[str, bytes], str]] = {
    "bomb": ({"ids_2.npy": npy(np.zeros(40 << 20, np.uint8))}, "would take 320 MiB of memory"),
    "objects": ({"ids_2.npy": npy(np.array([{}], object))}, "ids_2 is not a row of whole numbers"),
    "fractions": ({"counts_2.npy": npy([np.nan])}, "counts_2 is not a row of whole numbers"),
    "two axes": ({"ids_2.npy": npy(np.zeros((1, 1), int))}, "ids_2 is not a row of whole numbers"),
    "header beyond the file": ({"ids_2.npy": npy([1])[:-4]}, "ids_2 has 4 bytes where its header says 8"),
    "header behind the file": ({"ids_2.npy": npy([1]) + b"more"}, "ids_2 has 12 bytes where its header says 8"),
    "endless orders": ({"totals.npy": npy([9] * 1000)}, "of order 1000"),
    "below 0": ({"counts_1.npy": npy([-1] * V)}, "counts below 0"),
    "beyond 63 bits": ({"counts_1.npy": npy(np.full(V, 1 << 63, np.uint64))}, "counts below 0"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_no_header_is_believed(tmp_path: Path, damage: str) -> None:
    changes, message = DAMAGES[damage]
    path = write(tmp_path / "counts.npz", whole() | changes)
    started = time.perf_counter()
    tracemalloc.start()
    try:
        with pytest.raises(BundleError, match=message) as error:
            load_cooccurrence(path, V)
        assert tracemalloc.get_traced_memory()[1] < 8 << 20
    finally:
        tracemalloc.stop()
    assert time.perf_counter() - started < 1 and str(path) in str(error.value)


def test_what_is_judged_is_what_is_read(tmp_path: Path) -> None:
    """An array may hide behind the same name without its ending, which numpy prefers."""
    path = write(tmp_path / "counts.npz", whole() | {"ids_2": npy(np.zeros(1 << 20, int))})
    assert load_cooccurrence(path, V).orders == 2


def test_uncompressed_counts_are_read(tmp_path: Path) -> None:
    handmade.random_counts(tmp_path / "counts.npz", 300, 3)
    assert load_cooccurrence(tmp_path / "counts.npz", 300).orders == 3
