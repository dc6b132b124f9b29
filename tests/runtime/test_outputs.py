"""What a pass puts out: read late or never, and kept from later passes for whoever still has it."""

from pathlib import Path

import numpy as np
import pytest
from support import handmade

from dynamo_runtime import ALL, NONE, At, load_bundle
from dynamo_runtime.binding import documented_calls, inner_calls
from dynamo_runtime.names import TOPK_IDS, TOPK_LOGITS
from dynamo_runtime.outputs import Outputs
from dynamo_runtime.session import Session
from dynamo_runtime.step import Last

TOKENS = np.random.default_rng(0).integers(1, 300, 90).tolist()
CHUNKS = ([1, 2, 3], [4, 5, 6], [7], [8], [9, 10, 11])


def test_a_step_outlives_later_steps(multi: Path) -> None:
    session = Session(load_bundle(multi), threads=1)
    first = session.step(TOKENS[:5], rows=ALL)
    kept = [array.copy() for head in (1, 2, 3) for array in (first.logits(head), *first.topk(head))]
    session.step(TOKENS[5:10], rows=ALL)
    session.step([1])
    again = [array for head in (1, 2, 3) for array in (first.logits(head), *first.topk(head))]
    assert all(np.array_equal(a, b) for a, b in zip(kept, again, strict=True))


def test_what_nobody_has_read_outlives_later_steps(multi: Path) -> None:
    """It lies in memory that the next pass of as many rows writes to."""
    session, other = (Session(load_bundle(multi), threads=1) for _ in range(2))
    steps, others = [], []
    for tokens in CHUNKS:
        steps.append(session.step(tokens, rows=ALL, heads=NONE))
        others.append(other.step(tokens, rows=ALL, heads=NONE))
        assert others[-1].logits().shape[0] == others[-1].topk()[0].shape[0] == len(tokens)
    session.close()
    for step, expected in zip(steps, others, strict=True):
        assert step.best() == expected.best() == expected.logits().argmax(-1).tolist()
        assert np.array_equal(step.logits(), expected.logits())
        for one, same in zip(step.topk(), expected.topk(), strict=True):
            assert np.array_equal(one, same)


def test_what_was_read_is_not_overwritten(multi: Path) -> None:
    """Nor if the step itself is gone."""
    session = Session(load_bundle(multi), threads=1)
    step = session.step([1, 2, 3], rows=ALL)
    read = step.logits(), *step.topk()
    copies = [array.copy() for array in read]
    del step
    session.step([4, 5, 6], rows=ALL)
    assert all(np.array_equal(array, copy) for array, copy in zip(read, copies, strict=True))


def test_the_best_tokens_are_those_of_the_rows_that_are_left(multi: Path) -> None:
    step = Session(load_bundle(multi), threads=1).step([1, 2, 3, 4, 5], rows=ALL)
    best = step.logits().argmax(-1).tolist()
    assert step.best() == best
    assert step.without(2).best() == best[2:]


def test_the_largest_logits_of_a_row_are_those_of_its_top_k(multi: Path) -> None:
    """Whether the arrays were read before or not, the row is counted from the end, and some are hidden."""
    whole = Session(load_bundle(multi), threads=1).step([1, 2, 3, 4, 5], rows=ALL, heads=ALL)
    logits, ids = Session(load_bundle(multi), threads=1).step([1, 2, 3, 4, 5], rows=ALL).topk()
    for step, first in ((whole, 0), (whole.without(2), 2)):
        for row, expected in ((0, first), (1, first + 1), (-1, 4), (-3, 2)):
            for most in (1, 7, 10**6):
                found = step.largest(row, most)
                assert found == (logits[expected, :most].tolist(), ids[expected, :most].tolist())
    ahead = whole.ahead(3)
    for part in range(2):
        values, places = ahead.topk(part)
        assert ahead.largest(part) == (values[0].tolist(), places[0].tolist())
    array = Outputs({TOPK_LOGITS: logits[None], TOPK_IDS: ids[None]})
    assert array.rows == 5
    assert array.largest(2, 3) == whole.largest(2, 3)


def test_what_heads_have_said_outlives_their_next_run(multi: Path) -> None:
    """It is over the memory that they write to."""
    step = Session(load_bundle(multi), threads=1).step([1, 2, 3, 4], rows=ALL, heads=ALL)
    early = step.ahead(1)
    values, ids = early.topk(0)
    largest = early.largest(1)
    later = step.ahead(2)
    assert not np.array_equal(later.topk(0)[0], values) and later.largest(1) != largest
    assert early.largest(1) == largest
    assert np.array_equal(early.topk(0)[0], values) and np.array_equal(early.topk(0)[1], ids)


def test_onnxruntime_is_called_by_what_it_documents_where_there_is_nothing_else(multi: Path) -> None:
    session = Session(load_bundle(multi), threads=1)
    expected = session.step([1, 2, 3], rows=ALL).topk()
    bound = session._bound
    assert bound._calls.place != ("cpu", 0)  # this onnxruntime has something quicker

    class Foreign:
        bind_input, bind_output = bound.binding.bind_input, bound.binding.bind_output

    bound._calls = inner_calls(session._session, Foreign)
    assert bound._calls.place == ("cpu", 0)
    bound._calls = documented_calls(session._session, bound.binding)
    session.cache.reset()
    for one, same in zip(session.step([1, 2, 3], rows=ALL).topk(), expected, strict=True):
        assert np.array_equal(one, same)


@pytest.mark.parametrize("kind", ["parallel", "cp"])
def test_rows_of_heads_inside_the_graph_change_as_the_rows_of_the_first_do(tmp_path: Path, kind: str) -> None:
    """Formats 2 and 3: as many rows in all, of other heads."""
    bundle = load_bundle(
        handmade.write_bundle(tmp_path / "old", 3, graph={"kind": kind, "rank": 2, "format_version": 3})
    )
    session, parts = Session(bundle, threads=1), bundle.topology.parts
    first = session.step([1, 2, 3], rows=Last(1), heads=At([-1]))
    second = session.step(list(range(4, 6 + parts)), rows=Last(1 + parts), heads=NONE)
    assert len(first.best()) == 1
    assert first.ahead().topk(parts - 1)[1].shape[0] == 1
    assert len(second.best()) == 1 + parts
    assert second.best() == second.logits().argmax(-1).tolist()
