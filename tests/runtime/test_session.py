"""Session and KV cache: the same numbers however tokens are cut into passes and whatever was rolled back."""

import tracemalloc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from support import handmade
from support.dense_heads import DenseHeads

from dynamo_runtime import (
    ALL,
    NONE,
    At,
    Backend,
    Bundle,
    BundleError,
    EngineError,
    Last,
    ParameterError,
    PromptError,
    ProviderError,
    Session,
    heads,
    load_bundle,
)
from dynamo_runtime.kv_cache import KVCache
from dynamo_runtime.manifest import DrafterGraph
from dynamo_runtime.parallel import ParallelHeads
from dynamo_runtime.step import Ahead

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


def test_topk_outputs_are_the_largest_of_the_rows(multi: Path) -> None:
    step = Session(load_bundle(multi), threads=1).step(TOKENS, rows=Last(3))
    for head, rows in ((1, 3), (2, 1), (3, 1)):
        logits, ids = step.topk(head)
        most = 128 if head == 1 else 64
        assert logits.shape == ids.shape == (rows, most)
        assert np.array_equal(np.take_along_axis(step.logits(head), ids, 1), logits)
        assert np.array_equal(logits, -np.sort(-step.logits(head), axis=1)[:, :most])


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
    changed = Session(bundle, given.backend, optimization="basic").backend
    assert changed == Backend(provider="cpu", threads=1, optimization="basic")


def test_a_bundle_can_be_built_in_memory(multi: Path) -> None:
    read = load_bundle(multi)
    built = Bundle(
        folder=read.folder,
        topology=ParallelHeads(3),
        drafter=DrafterGraph("drafter.onnx", 2, handmade.KV_HEADS, 64),
        vocab_size=read.vocab_size,
        context_length=640,
        kv_layers=2,
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


GRAPHS: dict[str, dict[str, Any]] = {
    "beside": {},
    "conditioned, with a draft vocabulary": {"conditioned": True, "vocabulary": range(39, 3, -2)},
    "joint": {"kind": "cp", "rank": 2},
    "inside": {"format_version": 3},
    "inside, always": {"format_version": 3, "skips": False},
    "inside, joint": {"format_version": 3, "kind": "cp", "rank": 2},
}
SHORT = [token % 40 for token in TOKENS]


def made(folder: Path, name: str) -> Bundle:
    """One of `GRAPHS`, of three tokens and 40 words."""
    options = dict(GRAPHS[name])
    return handmade.small_bundle(folder / "bundle", options.pop("kind", "parallel"), 3, vocab=40, **options)


def said(bundle: Bundle, ahead: Ahead, before: Sequence[int]) -> list[np.ndarray]:
    """All that heads say of their rows, told what stands in front."""
    parts = [ahead.logits(part, before) for part in range(bundle.topology.parts)]
    parts += [array for part in range(bundle.topology.parts) for array in ahead.topk(part, before)[:1]]
    return [*parts, *(ahead.output(name) for name in bundle.topology.outputs)]


@pytest.mark.parametrize("name", GRAPHS)
def test_heads_catch_up_with_passes_that_left_them_out(tmp_path: Path, name: str) -> None:
    """Whichever passes skip the heads, and whatever is rolled back, the heads then say what they always say."""
    bundle = made(tmp_path, name)
    always, sometimes = (Session(bundle, threads=1, growth=8) for _ in range(2))
    assert sometimes.skips_heads == (name != "inside, always")
    rng = np.random.default_rng(3)
    at = 0
    while at < len(SHORT):
        m = int(rng.integers(1, 6))
        part = SHORT[at : at + m]
        before = (SHORT * 2)[at + 1 : at + 1 + len(part)]
        expected = always.step(part, rows=ALL, heads=ALL)
        theirs = said(bundle, expected.ahead(), before)
        if rng.random() < 0.6:
            step = sometimes.step(part, rows=ALL, heads=NONE)
            assert sometimes.cache.seen < sometimes.cache.length or name == "inside, always"
        else:
            step = sometimes.step(part, rows=ALL, heads=ALL)
            for one, other in zip(said(bundle, step.ahead(), before), theirs, strict=True):
                assert np.allclose(one, other, **CLOSE)
            assert sometimes.cache.seen == sometimes.cache.length
        assert np.allclose(step.logits(), expected.logits(), **CLOSE)
        back = at + int(rng.integers(1, len(part) + 1))
        always.cache.rollback(back)
        sometimes.cache.rollback(back)
        at = back


@pytest.mark.parametrize("name", ["beside", "conditioned, with a draft vocabulary", "joint"])
@pytest.mark.parametrize("chunk", [7, 512])
def test_heads_equal_numpy_whatever_was_asked_before(
    tmp_path: Path, name: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows twice, out of order, after later ones, one by one and together; after a rollback; as the caches grow."""
    monkeypatch.setattr(heads, "CATCH_UP_CHUNK", chunk)
    bundle = made(tmp_path, name)
    dense, session = DenseHeads(bundle), Session(bundle, threads=1, growth=8)
    states = dense.states(SHORT)

    def check(ahead: Ahead, positions: Sequence[int], before: Sequence[int]) -> None:
        for part in range(bundle.topology.parts):
            expected = dense.head(states[list(positions), part], part, before)
            np.testing.assert_allclose(ahead.logits(part, before), expected, **CLOSE)
            logits, ids = ahead.topk(part, before)
            np.testing.assert_allclose(logits, np.take_along_axis(expected, ids, 1), **CLOSE)
            assert np.array_equal(logits, -np.sort(-ahead.logits(part, before), axis=1)[:, : logits.shape[1]])
            assert all(len(set(row)) == len(row) for row in ids.tolist())
        if bundle.topology.outputs:
            np.testing.assert_allclose(ahead.output("gate"), dense.gate(SHORT)[list(positions)], **CLOSE)

    session.step(SHORT[:30], heads=NONE)  # never asked
    step = session.step(SHORT[30:40], rows=ALL, heads=ALL)
    np.testing.assert_allclose(step.logits(), dense.first(SHORT)[30:40], **CLOSE)
    for row in (9, 2, 2, -1, 0):
        check(step.ahead(row), [30 + row % 10], [row % 10])
    check(step.ahead(), range(30, 40), SHORT[5:15])
    check(step.ahead(), range(30, 40), SHORT[15:25])  # told something else
    later = session.step(SHORT[40:60], heads=At([3, 3, 19, 7]))
    check(step.ahead(4), [34], [8])  # of an earlier pass, after a later one
    check(later.ahead(), [43, 43, 59, 47], [1, 2, 3, 4])
    assert session.cache.seen == session.cache.length == 60
    session.cache.rollback(50)
    session.step([1, 2, 3], heads=NONE)
    session.cache.rollback(50)
    session.step(SHORT[50:58], heads=NONE)
    assert session.cache.seen == 50
    last = session.step(SHORT[58:], rows=Last(1))
    check(last.ahead(0), [len(SHORT) - 1], [6])
    assert session.heads is not None and session.heads.kv.capacity >= len(SHORT)


def test_heads_are_asked_before_their_rows_are_gone(tmp_path: Path) -> None:
    """What was said stays; what is asked for the first time must still be held as the pass wrote it."""
    session = Session(made(tmp_path, "conditioned, with a draft vocabulary"), threads=1)
    session.step(SHORT[:9])
    step = session.step(SHORT[9:12], heads=ALL)
    early = step.ahead(1)
    expected = early.logits(0, [3]).copy()
    session.cache.rollback(10)
    assert step.ahead(0).rows == 1  # still held
    for row in (1, 2, None):
        with pytest.raises(ValueError, match="does not hold any more"):
            step.ahead(row)
    session.step([1, 2, 3, 4])  # other tokens in its place
    with pytest.raises(ValueError, match="does not hold any more"):
        step.ahead(1)
    assert np.array_equal(early.logits(0, [3]), expected)
    assert early.logits(1, [5]).shape == (1, 40)  # from the states of then
    with pytest.raises(ValueError, match="name it"):
        early.logits(0)
    with pytest.raises(ValueError, match="name it"):
        early.logits(0, [1, 2])
    with pytest.raises(ValueError, match="asked for 0 rows"):
        session.step([1], heads=NONE).ahead()
    last = session.step([1])
    session.close()
    for ask in (last.ahead, lambda: early.logits(0, [9])):
        with pytest.raises(EngineError, match="closed"):
            ask()


def test_a_cache_full_of_tokens_has_room_for_its_heads(tmp_path: Path) -> None:
    """In steps of growth that its length is no multiple of."""
    session = Session(made(tmp_path, "beside"), threads=1, growth=7, max_length=25)
    session.step(SHORT[:24], heads=NONE)
    assert session.step(SHORT[24:25]).ahead().rows == 1
    assert session.heads is not None and session.heads.kv.capacity == session.cache.capacity == 25


@pytest.mark.parametrize(("beside", "inside"), [("beside", "inside"), ("joint", "inside, joint")])
def test_heads_of_earlier_formats_say_the_same(tmp_path: Path, beside: str, inside: str) -> None:
    found = []
    for name in (beside, inside):
        bundle = made(tmp_path / name, name)
        session = Session(bundle, threads=1)
        session.step(SHORT[:50], heads=NONE)
        step = session.step(SHORT[50:60], rows=ALL, heads=At([0, 4, -1]))
        found.append([step.logits(), *said(bundle, step.ahead(), []), *said(bundle, step.ahead(1), [])])
    for one, other in zip(*found, strict=True):
        assert np.allclose(one[..., :64], other[..., :64], **CLOSE)


def test_cache_remembers_what_the_heads_have_seen() -> None:
    cache = KVCache(1, 1, 2, 100, width=2, growth=8)
    for length in (5, 3, 4):
        cache.reserve(cache.length + length)
        cache.advance(range(length), seen=length == 5)
    assert (cache.length, cache.seen, cache.passes) == (12, 5, 3)
    assert cache.has([0, 4], 1) and cache.has(range(5, 8), 2) and not cache.has([4, 5], 2) and not cache.has([12], 3)
    cache.rollback(6)
    assert cache.seen == 5 and not cache.has([6], 2)
    cache.advance([7])
    assert cache.has([6], 4) and not cache.has([6], 2)
    cache.rollback(3)
    assert cache.seen == 3
    cache.advance([1], seen=True)
    assert cache.seen == cache.length == 4
    cache.reset()
    assert cache.seen == 0


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
def test_heads_are_counted_before_anything_is_decoded(copied, tmp_path: Path, n_heads: int) -> None:
    """In old formats the base's last layers would be taken for heads, and left out: wrong text, unnoticed."""
    copied.edit(topology={"kind": "parallel", "n_heads": n_heads})
    with pytest.raises(BundleError, match="not the graph its manifest describes"):
        Session(load_bundle(copied.folder), threads=1)
    changed = {"topology": {"kind": "parallel", "n_heads": n_heads}}
    old = handmade.write_bundle(tmp_path / "old", 3, graph={"format_version": 3}, **changed)
    with pytest.raises(BundleError, match="not the graph its manifest describes"):
        Session(load_bundle(old), threads=1)


def test_the_check_of_heads_leaves_no_trace(multi: Path) -> None:
    session = Session(load_bundle(multi), threads=1)
    assert (session.cache.length, session.passes, session.ort_seconds, session.step_seconds) == (0, 0, 0, 0)


def test_an_axis_without_a_size(copied) -> None:
    """What onnxruntime does not find out by itself has to be said."""
    path = copied.folder / "model.onnx"
    model = onnx.load(path)
    (cache,) = [each for each in model.graph.input if each.name == "past_key_values.1.value"]
    cache.type.tensor_type.shape.dim[1].dim_param = "heads"
    onnx.save(model, path)
    copied.relist()
    with pytest.raises(BundleError, match=r"input past_key_values.1.value has no kv_heads of a fixed size"):
        Session(load_bundle(copied.folder), threads=1)


@pytest.mark.parametrize(("field", "size"), [("kv_heads", 5), ("head_size", 8)])
def test_the_caches_of_the_graph_are_compared(copied, field: str, size: int) -> None:
    copied.edit(**{field: size})
    with pytest.raises(BundleError, match=f"{field} of .* where the manifest says {size}"):
        Session(load_bundle(copied.folder), threads=1)
