"""Session and KV cache: the same numbers however tokens are cut into passes and whatever was rolled back."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from support import handmade

from dynamo_runtime import (
    ALL,
    NONE,
    At,
    Backend,
    Bundle,
    BundleError,
    Last,
    ParameterError,
    PromptError,
    ProviderError,
    Session,
    Step,
    load_bundle,
)
from dynamo_runtime.kv_cache import KVCache
from dynamo_runtime.parallel import ParallelHeads

TOKENS = np.random.default_rng(0).integers(1, 300, 90).tolist()
CLOSE = {"rtol": 0, "atol": 2e-5}


@pytest.fixture(scope="module")
def whole(multi: Path) -> list[np.ndarray]:
    """All rows of all heads from one pass over TOKENS."""
    session = Session(load_bundle(multi), threads=1)
    step = session.step(TOKENS, rows=ALL, heads=ALL)
    return [step.logits(head).copy() for head in (1, 2, 3)]


@pytest.mark.parametrize("growth", [1, 7, 256])
def test_passes_of_any_size_equal_one_pass(multi: Path, whole: list[np.ndarray], growth: int) -> None:
    """Chunked prefill equals the whole, and a cache that grows equals one that does not."""
    session = Session(load_bundle(multi), threads=1, growth=growth)
    sizes = np.random.default_rng(growth).integers(1, 9, 90)
    at = 0
    capacities = {session.cache.capacity}
    for m in sizes:
        chunk = TOKENS[at : at + m]
        if not chunk:
            break
        step = session.step(chunk, rows=Last(len(chunk)), heads=At([0, -1]))
        rows = slice(at, at + len(chunk))
        assert np.allclose(step.logits(1), whole[0][rows], **CLOSE)
        for head in (2, 3):
            assert np.allclose(step.logits(head), whole[head - 1][[at, rows.stop - 1]], **CLOSE)
        at += len(chunk)
        capacities.add(session.cache.capacity)
    assert at == len(TOKENS) == session.cache.length
    assert (len(capacities) > 1) == (growth < 90)


def test_rollback_is_a_length(multi: Path, whole: list[np.ndarray]) -> None:
    session = Session(load_bundle(multi), threads=1)
    session.step(TOKENS[:40])
    session.step([5, 6, 7, 8])
    session.cache.rollback(38)
    assert session.cache.tokens == TOKENS[:38]
    assert np.allclose(session.step(TOKENS[38:45], rows=ALL).logits(), whole[0][38:45], **CLOSE)
    with pytest.raises(ValueError, match="roll back"):
        session.cache.rollback(46)


def test_a_step_outlives_later_steps(multi: Path) -> None:
    session = Session(load_bundle(multi), threads=1)
    first = session.step(TOKENS[:5], rows=ALL)
    kept = [array.copy() for head in (1, 2, 3) for array in (first.logits(head), *first.topk(head))]
    session.step(TOKENS[5:10], rows=ALL)
    session.step([1])
    again = [array for head in (1, 2, 3) for array in (first.logits(head), *first.topk(head))]
    assert all(np.array_equal(a, b) for a, b in zip(kept, again, strict=True))


def test_topk_outputs_are_the_largest_of_the_rows(multi: Path) -> None:
    step = Session(load_bundle(multi), threads=1).step(TOKENS, rows=Last(3))
    for head, rows in ((1, 3), (2, 1), (3, 1)):
        logits, ids = step.topk(head)
        assert logits.shape == ids.shape == (rows, 128)
        assert np.array_equal(np.take_along_axis(step.logits(head), ids, 1), logits)
        assert np.array_equal(logits, -np.sort(-step.logits(head), axis=1)[:, :128])


def test_further_heads_differ_from_the_first_which_is_the_plain_model(
    multi: Path, plain: Path, whole: list[np.ndarray]
) -> None:
    alone = Session(load_bundle(plain), threads=1).step(TOKENS, rows=ALL).logits()
    assert np.allclose(alone, whole[0], **CLOSE)
    assert np.abs(whole[0] - whole[1]).max() > 0.1
    assert np.abs(whole[1] - whole[2]).max() > 0.1


def test_buffers_are_written_in_place(multi: Path) -> None:
    session = Session(load_bundle(multi), threads=1)
    addresses = [buffer.ctypes.data for pair in session.cache.buffers for buffer in pair]
    session.step(TOKENS[:9])
    assert [buffer.ctypes.data for pair in session.cache.buffers for buffer in pair] == addresses
    for keys, values in session.cache.buffers:
        assert np.abs(keys[:, :, :9]).min(axis=-1).max() > 0
        assert np.any(values[:, :, 8])
        assert not np.any(keys[:, :, 9:])


def test_cache_grows_in_doubling_steps_up_to_its_limit() -> None:
    cache = KVCache(1, 1, 2, 1000, growth=16)
    capacities = []
    for length in range(1, 1001):
        if cache.reserve(length):
            capacities.append(cache.capacity)
        cache.advance([0])
    assert capacities == [32, 64, 128, 256, 512, 1000]
    with pytest.raises(PromptError, match="1001 tokens"):
        cache.reserve(1001)


def test_refuses_wrong_arguments(multi: Path) -> None:
    bundle = load_bundle(multi)
    session = Session(bundle, threads=1, max_length=10)
    with pytest.raises(PromptError, match="no tokens"):
        session.step([])
    with pytest.raises(PromptError, match="from 0 to 319"):
        session.step([320])
    with pytest.raises(PromptError, match="11 tokens do not fit"):
        session.step([1] * 11)
    for wrong in ({"rows": Last(3)}, {"rows": Last(-1)}, {"rows": NONE}, {"heads": At([2])}, {"heads": At([-3])}):
        with pytest.raises(ValueError, match="rows"):
            session.step([1, 2], **wrong)
    assert session.cache.length == 0
    for wrong in ({"threads": 0}, {"max_length": 0}, {"max_length": 641}):
        with pytest.raises(ParameterError):
            Session(bundle, **wrong)
    with pytest.raises(ProviderError, match="unknown execution provider 'tpu'"):
        Session(bundle, provider="tpu")
    with pytest.raises(ParameterError, match="unknown option speed of the backend; there are provider"):
        Session(bundle, speed=3)


def test_a_backend_is_an_object_or_keywords(multi: Path) -> None:
    bundle = load_bundle(multi)
    given = Session(bundle, Backend(provider="cpu", threads=1))
    assert given.backend == Session(bundle, provider="cpu", threads=1).backend
    assert Session(bundle, given.backend, spinning=True).backend == Backend(provider="cpu", threads=1, spinning=True)


def test_a_bundle_can_be_built_in_memory(multi: Path) -> None:
    read = load_bundle(multi)
    built = Bundle(
        folder=read.folder,
        topology=ParallelHeads(3),
        vocab_size=read.vocab_size,
        context_length=640,
        kv_layers=4,
        kv_heads=1,
        head_size=16,
    )
    assert Session(built, threads=1).step([1, 2]).logits(3).shape == (1, read.vocab_size)


def test_time_inside_onnxruntime_is_counted(multi: Path) -> None:
    session = Session(load_bundle(multi), threads=1)
    session.step(TOKENS)
    once = session.ort_seconds
    session.step([1])
    assert 0 < once < session.ort_seconds
    assert session.passes == 2


@pytest.mark.parametrize("kind", ["parallel", "cp"])
@pytest.mark.parametrize("twin_bytes", [0, 1 << 30])
def test_heads_catch_up_with_passes_that_left_them_out(tmp_path: Path, kind: str, twin_bytes: int) -> None:
    """Whichever passes skip the heads, and whatever is rolled back, the heads then say what they always say."""
    bundle = handmade.small_bundle(tmp_path / kind, kind, 3, vocab=40, rank=2)
    tokens = [token % 40 for token in TOKENS]

    def said(step: Step) -> list[np.ndarray]:
        joint = bundle.topology
        return [step.logits(2), step.logits(3)] if kind == "parallel" else [joint.gate(step), joint.factors(step)]

    always, sometimes = (Session(bundle, threads=1, growth=8, twin_bytes=twin_bytes) for _ in range(2))
    assert sometimes.skips_heads
    rng = np.random.default_rng(3)
    at = 0
    while at < len(tokens):
        m = int(rng.integers(1, 6))
        part = tokens[at : at + m]
        expected = always.step(part, rows=ALL, heads=ALL)
        if rng.random() < 0.6:
            step = sometimes.step(part, rows=ALL, heads=NONE)
            assert sometimes.cache.skipped_length > 0
        else:
            step = sometimes.step(part, rows=ALL, heads=ALL)
            assert sometimes.cache.skipped_length == 0
            for ours, theirs in zip(said(step), said(expected), strict=True):
                assert np.allclose(ours, theirs, **CLOSE)
        assert np.allclose(step.logits(), expected.logits(), **CLOSE)
        back = at + int(rng.integers(1, len(part) + 1))
        always.cache.rollback(back)
        sometimes.cache.rollback(back)
        at = back


def test_cache_remembers_what_the_heads_have_not_seen() -> None:
    cache = KVCache(1, 1, 2, 100)
    states = np.arange(40.0).reshape(20, 2)
    cache.advance(range(5))
    cache.advance(range(3), states[:3])
    cache.advance(range(4), states[3:7])
    assert (cache.length, cache.skipped_length) == (12, 7)
    cache.rollback(9)
    assert np.array_equal(np.concatenate(cache.skipped), states[:4])
    cache.rollback(8)
    assert np.array_equal(np.concatenate(cache.skipped), states[:3])
    cache.rollback(4)
    assert (cache.length, cache.skipped_length, cache.skipped) == (4, 0, [])
    cache.advance([1], states[:1])
    cache.advance([2])
    assert cache.skipped_length == 0


def test_a_long_context_costs_nothing_before_it_is_used(copied) -> None:
    copied.edit(context_length=1 << 27)
    tracemalloc.start()
    try:
        session = Session(load_bundle(copied.folder), threads=1)
        session.step(TOKENS)
        assert tracemalloc.get_traced_memory()[1] < 50 << 20
    finally:
        tracemalloc.stop()
    assert session.max_length == 1 << 27


def test_rows_may_be_wanted_twice(multi: Path) -> None:
    session = Session(load_bundle(multi), threads=1, growth=1)
    assert len(session.step(TOKENS[:1], heads=At([0, 0, -1])).logits(2)) == 3


@pytest.mark.parametrize("n_heads", [2, 4])
def test_heads_are_counted_before_anything_is_decoded(copied, n_heads: int) -> None:
    """The base's last layers would be taken for heads, and left out of passes without them: wrong text, unnoticed."""
    copied.edit(topology={"kind": "parallel", "n_heads": n_heads})
    with pytest.raises(BundleError, match=f"puts out 3 rows of logits where {n_heads} were asked for"):
        Session(load_bundle(copied.folder), threads=1)


def test_the_check_of_heads_leaves_no_trace(multi: Path) -> None:
    session = Session(load_bundle(multi), threads=1)
    assert (session.cache.length, session.passes, session.ort_seconds, session.step_seconds) == (0, 0, 0, 0)


def test_an_axis_without_a_size(copied) -> None:
    """What onnxruntime does not find out by itself has to be said."""
    path = copied.folder / "model.onnx"
    model = onnx.load(path)
    (cache,) = [each for each in model.graph.input if each.name == "past_key_values.3.value"]
    cache.type.tensor_type.shape.dim[1].dim_param = "heads"
    onnx.save(model, path)
    copied.relist()
    with pytest.raises(BundleError, match=r"input past_key_values.3.value has no kv_heads of a fixed size"):
        Session(load_bundle(copied.folder), threads=1)


@pytest.mark.parametrize(("field", "size"), [("kv_heads", 5), ("head_size", 8)])
def test_the_caches_of_the_graph_are_compared(copied, field: str, size: int) -> None:
    copied.edit(**{field: size})
    with pytest.raises(BundleError, match=f"{field} of .* where the manifest says {size}"):
        Session(load_bundle(copied.folder), threads=1)
