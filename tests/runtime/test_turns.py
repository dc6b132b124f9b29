"""One engine for many: threads that wait their turn, streams that are given up, and an engine that is closed."""

import gc
import queue
import random
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dynamo_runtime import Conversation, Engine, EngineError, PromptError, TextStream, load_bundle

PROMPT = "def fib(n):\n    if n < 2:\n        return n\n"
LONG: dict[str, Any] = {"seed": 4, "max_new_tokens": 300, "ignore_eos": True}
SHORT: dict[str, Any] = {"seed": 4, "max_new_tokens": 12, "ignore_eos": True}
WAYS = (
    {"strategy": "autoregressive"},
    {"strategy": "dynamo", "backoff_threshold": 0.2},
    {"strategy": "speculative", "draft_choice": "sample"},
    {"strategy": "auto", "log_probabilities": True},
)


@pytest.fixture
def engine(multi: Path) -> Iterator[Engine]:
    """One of its own: a test that fails must not leave its turn to the next."""
    with Engine(multi, provider="cpu", threads=1) as made:
        yield made


def elsewhere(work: Callable[[], Any], patience: float = 30.0) -> Any:
    """What some work gives in another thread."""
    found: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue()

    def run() -> None:
        try:
            found.put((work(), None))
        except BaseException as error:
            found.put((None, error))

    threading.Thread(target=run, daemon=True).start()
    result, error = found.get(timeout=patience)
    if error is not None:
        raise error
    return result


def test_eight_threads_get_the_texts_of_one(engine: Engine) -> None:
    """Whatever the others do with the engine meanwhile: finish, cancel, break off, fail, reset, or only encode."""
    jobs = [
        (f"{PROMPT}# {number}", {"seed": number, "max_new_tokens": 20, "ignore_eos": True} | WAYS[number % len(WAYS)])
        for number in range(48)
    ]
    expected = []
    for prompt, options in jobs:
        engine.reset()
        expected.append(engine.generate(prompt, **options).tokens)
    left: queue.SimpleQueue[int] = queue.SimpleQueue()
    for number in range(len(jobs)):
        left.put(number)
    wrong: list[Any] = []
    kept: list[TextStream] = []  # nobody goes on with these

    def fails(context: Any, row: np.ndarray) -> np.ndarray:
        raise ZeroDivisionError

    def disturb(chance: random.Random, prompt: str, options: dict[str, Any]) -> None:
        stream = engine.stream(prompt, **options)
        match chance.randrange(6):
            case 0:
                next(stream)  # and drop it
            case 1:
                next(stream)
                stream.cancel()
                kept.append(stream)
            case 2:
                with stream:
                    next(stream)
                kept.append(stream)
            case 3:
                with pytest.raises(ZeroDivisionError):
                    engine.generate(prompt, logits_processors=[fails], max_new_tokens=2)
            case 4:
                engine.reset()
                engine.encode(prompt)
            case 5:
                threading.Timer(0.002, stream.cancel).start()
                kept.append(stream)
                for _ in stream:
                    pass

    def work(seed: int) -> None:
        chance = random.Random(seed)
        try:
            while True:
                number = left.get_nowait()
                prompt, options = jobs[number]
                disturb(chance, *jobs[chance.randrange(len(jobs))])
                found = engine.generate(prompt, **options)
                if (found.tokens, found.finish_reason) != (expected[number], "length"):
                    wrong.append((number, found))
        except queue.Empty:
            pass
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(seed,), daemon=True) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
        assert not thread.is_alive()
    assert wrong == []


def test_another_thread_waits_its_turn_or_is_told(engine: Engine) -> None:
    alone = engine.generate("x", **SHORT).tokens
    stream = engine.stream(PROMPT, **LONG)
    next(stream)
    for call in (engine.generate, lambda prompt, **options: next(engine.stream(prompt, **options))):
        with pytest.raises(EngineError, match="at work for another thread"):
            elsewhere(lambda call=call: call("x", wait=False, **SHORT))
    waiting: list[Any] = []
    thread = threading.Thread(target=lambda: waiting.append(engine.generate("x", **SHORT).tokens), daemon=True)
    thread.start()
    rest = list(stream)  # untouched by the one who waits
    thread.join(30)
    assert waiting == [alone]
    engine.reset()
    assert stream.text == engine.generate(PROMPT, **LONG).text and rest
    assert elsewhere(lambda: engine.generate("x", wait=False, **SHORT).tokens) == alone


def test_those_who_wait_are_served_in_line(engine: Engine) -> None:
    first, order = engine.stream(PROMPT, **LONG), []
    next(first)
    threads = []
    for number in range(4):

        def work(number: int = number) -> None:
            engine.generate("x", **SHORT)
            order.append(number)

        threads.append(threading.Thread(target=work, daemon=True))
        threads[-1].start()
        while len(engine.session.turns._line) <= number:
            time.sleep(0.001)
    first.close()
    for _ in range(3):  # this thread is quicker than they wake, and stands in line all the same
        engine.generate("y", **SHORT)
        order.append("again")
    for thread in threads:
        thread.join(30)
    assert [each for each in order if each != "again"] == [0, 1, 2, 3] and order.index(3) < len(order) - 1


@pytest.mark.parametrize("end", ["close", "with", "cancel", "drop", "collect", "fail", "interrupt", "thread"])
def test_whatever_ends_a_stream_frees_the_engine(engine: Engine, end: str) -> None:
    expected = engine.generate("x", **SHORT).tokens
    raised: list[type[BaseException]] = []

    def processor(context: Any, row: np.ndarray) -> np.ndarray:
        if raised:
            raise raised[0]
        return row

    stream: TextStream | None = engine.stream(PROMPT, logits_processors=[processor], strategy="autoregressive", **LONG)
    assert stream is not None
    if end == "thread":
        elsewhere(lambda: next(stream))
        time.sleep(0.05)
    elif end == "with":
        with stream:
            next(stream)
        assert list(stream) == []
    else:
        next(stream)
    if end == "close":
        stream.close()
        stream.close()
        assert list(stream) == [] and stream.result().finish_reason == "cancelled"
    elif end == "cancel":
        elsewhere(stream.cancel)
    elif end == "drop":
        stream = None
    elif end == "collect":
        ring: list[Any] = [stream]
        ring.append(ring)
        stream = ring = None  # type: ignore[assignment]
        gc.collect()
    elif end in ("fail", "interrupt"):
        raised.append(ZeroDivisionError if end == "fail" else KeyboardInterrupt)
        with pytest.raises(raised[0]):
            list(stream)
        assert list(stream) == []
    assert elsewhere(lambda: engine.generate("x", **SHORT).tokens) == expected
    if end == "cancel":
        assert stream is not None
        passes = engine.session.passes
        list(stream)  # what was held back, without a pass
        assert (stream.finish_reason, engine.session.passes) == ("cancelled", passes)
    if end == "thread":
        with pytest.raises(EngineError, match="another generation has begun"):
            next(stream)  # type: ignore[arg-type]


def test_ctrl_c_may_come_at_any_place(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate("x", **SHORT).tokens

    def interrupted(*given: Any) -> str:
        raise KeyboardInterrupt

    for begun in (False, True):
        stream = engine.stream(PROMPT, **LONG)
        if begun:
            next(stream)
        with monkeypatch.context() as patch:
            patch.setattr(stream, "_work", interrupted)
            with pytest.raises(KeyboardInterrupt):
                next(stream)
        assert list(stream) == []
        assert (
            engine.generate("x", **SHORT).tokens == elsewhere(lambda: engine.generate("x", **SHORT).tokens) == expected
        )


def test_one_who_waits_can_be_cancelled(engine: Engine) -> None:
    first, second = engine.stream(PROMPT, **LONG), engine.stream("x", **SHORT)
    next(first)
    threading.Timer(0.05, second.cancel).start()
    assert elsewhere(lambda: list(second)) == []
    assert second.finish_reason == "cancelled" and next(first)


def test_a_stream_that_never_began_has_no_text(engine: Engine) -> None:
    half = engine.encode("日")[:1]  # a character that is not whole
    stream = engine.stream([5, *half], **SHORT)
    stream.cancel()
    assert list(stream) == [] and stream.text == "" and stream.finish_reason == "cancelled"


def test_a_stream_may_be_read_by_one_thread_after_another(engine: Engine) -> None:
    expected = engine.generate(PROMPT, **SHORT).text
    engine.reset()
    stream, pieces = engine.stream(PROMPT, **SHORT), []
    while (piece := elsewhere(lambda: next(stream, None))) is not None:
        pieces.append(piece)
    assert "".join(pieces) == expected


def test_two_threads_cannot_read_the_same_stream_at_once(engine: Engine) -> None:
    inside, go_on = threading.Event(), threading.Event()

    def slow(context: Any, row: np.ndarray) -> np.ndarray:
        inside.set()
        assert go_on.wait(30)
        return row

    stream = engine.stream(PROMPT, logits_processors=[slow], **SHORT)
    thread = threading.Thread(target=lambda: list(stream), daemon=True)
    thread.start()
    assert inside.wait(30)
    with pytest.raises(EngineError, match="another thread is reading this generation"):
        next(stream)
    go_on.set()
    thread.join(30)
    assert stream.finish_reason == "length"


def test_a_generation_inside_another_is_refused(engine: Engine) -> None:
    def generates(context: Any, row: np.ndarray) -> np.ndarray:
        engine.generate("x", **SHORT)
        return row

    with pytest.raises(EngineError, match="cannot begin inside another one"):
        engine.generate(PROMPT, logits_processors=[generates], **SHORT)
    assert engine.generate(PROMPT, **SHORT).finish_reason == "length"


def test_the_same_thread_ends_its_older_stream(engine: Engine) -> None:
    for begin in (lambda: next(engine.stream("x", **SHORT)), engine.reset):
        stream = engine.stream(PROMPT, **LONG)
        next(stream)
        begin()
        with pytest.raises(RuntimeError, match="another generation has begun"):
            next(stream)


def test_a_conversation_that_begins_anew_ends_its_answer(engine: Engine) -> None:
    conversation = Conversation(engine)
    answer = engine.stream(PROMPT, **LONG)
    next(answer)
    conversation._answer = answer
    conversation.reset()
    assert list(answer) == []


def test_a_closed_engine_says_so(multi: Path) -> None:
    with Engine(multi, threads=1) as engine:
        stream, step = engine.stream(PROMPT, **LONG), engine.session.step([5, 6])
        next(stream)
        before = step.topk()[0].copy()
    engine.close()
    for use in (
        lambda: engine.generate("x"),
        lambda: engine.stream("x"),
        lambda: engine.encode("x"),
        lambda: engine.session.step([1]),
        engine.reset,
        lambda: next(stream),
    ):
        with pytest.raises(EngineError, match="the engine is closed"):
            use()
    assert (step.topk()[0] == before).all() and engine.session.cache.nbytes == 0


def test_closing_waits_for_the_generation_that_runs(engine: Engine) -> None:
    stream = engine.stream(PROMPT, **LONG)
    next(stream)
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    assert sum(map(len, stream)) and stream.finish_reason == "length"
    closing.join(30)
    with pytest.raises(EngineError, match="closed"):
        engine.generate("x")


def test_a_failed_growth_leaves_the_cache_as_it_was(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = engine.generate(PROMPT, **SHORT).tokens
    cache, made = engine.session.cache, []

    def few(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        made.append(shape)
        if len(made) > 3:
            raise MemoryError
        return np.zeros(shape, dtype)

    monkeypatch.setattr(cache, "_new", few)
    with pytest.raises(PromptError, match="no memory for a cache of"):
        engine.generate([7] * 400, max_new_tokens=3)
    assert engine.generate(PROMPT, **SHORT).tokens == expected


def test_counts_are_read_by_several_threads_at_once(multi: Path) -> None:
    """They belong to the bundle, and so to all of its engines."""
    counts = load_bundle(multi).cooccurrence
    nodes, kinds = np.arange(200), [np.arange(start, 320, 7) for start in range(7)]
    expected = [counts.extend(2, nodes, tokens, children_per_search=10**6) for tokens in kinds]
    wrong = []

    def work(kind: int) -> None:
        for _ in range(300):
            found = counts.extend(2, nodes, kinds[kind], children_per_search=10**6)
            if any(not np.array_equal(a, b) for a, b in zip(found, expected[kind], strict=True)):
                wrong.append(kind)

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=work, args=(kind,)) for kind in range(7)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(before)
    assert wrong == []
