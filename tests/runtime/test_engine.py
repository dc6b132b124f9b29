"""Generation end to end on a real graph: strategies, limits, stops, prefix reuse, cancelling, statistics."""

from pathlib import Path

import numpy as np
import pytest
from support import dense_dynamo as dense
from support.uncached import uncached_logits
from tokenizers import Tokenizer

from dynamo_runtime import Engine, ParameterError, PromptError, Session

PROMPT = "def fib(n):\n    if n < 2:\n        return n\n"


def test_autoregressive_greedy_equals_the_argmax_of_whole_passes(engine: Engine) -> None:
    tokens = engine.generate(
        PROMPT,
        strategy="autoregressive",
        temperature=0,
        repetition_penalty=1.0,
        max_new_tokens=30,
        ignore_eos=True,
    ).tokens
    context = engine.encode(PROMPT)
    for token in tokens:
        assert token == int(uncached_logits(engine, context)[0].argmax())
        context.append(token)


@pytest.mark.parametrize("temperature", [0, 0.7])
def test_dynamo_equals_the_dense_algorithm_step_by_step(engine: Engine, temperature: float) -> None:
    """Every pass of a real generation against Algorithm 1, literally, on logits computed from nothing."""
    counts = dense.Counts.from_npz(engine.bundle.folder / "cooccurrence.npz")
    result = engine.generate(
        PROMPT,
        strategy="dynamo",
        temperature=temperature,
        top_k=12,
        seed=5,
        backoff_threshold=0.4,
        max_new_tokens=40,
        ignore_eos=True,
    )
    options = dense.Options(k=12, temperature=temperature, epsilon_b=0.4)
    rng = np.random.default_rng(5)
    context, sizes = engine.encode(PROMPT), []
    start = len(context)
    while len(context) - start < 40:
        logits = uncached_logits(engine, context)
        tokens, _ = dense.generate(logits, set(context), rng.random(), options, counts)
        context += tokens
        sizes.append(len(tokens))
    assert result.tokens == context[start:][:40]
    assert result.statistics.rounds == len(sizes)
    assert len(set(sizes)) > 1


@pytest.mark.parametrize("strategy", ["autoregressive", "dynamo"])
def test_seeds_reproduce_and_differ(engine: Engine, strategy: str) -> None:
    options = {"strategy": strategy, "max_new_tokens": 40}
    if strategy == "dynamo":
        options |= {"cooccurrence_weight": 0.0, "backoff_threshold": 0.05}
    texts = []
    for seed in (1, 1, 2):
        engine.reset()
        texts.append(engine.generate(PROMPT, seed=seed, **options).tokens)
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 5, 7])
def test_max_new_tokens_is_exact_inside_a_step(engine: Engine, limit: int) -> None:
    full = engine.generate(PROMPT, seed=3, strategy="dynamo", backoff_threshold=0.0, max_new_tokens=12, ignore_eos=True)
    assert set(full.statistics.steps) == {3}
    engine.reset()
    cut = engine.generate(
        PROMPT, seed=3, strategy="dynamo", backoff_threshold=0.0, max_new_tokens=limit, ignore_eos=True
    )
    assert cut.tokens == full.tokens[:limit]
    assert cut.finish_reason == "length"
    assert cut.statistics.new_tokens == limit == sum(size * n for size, n in cut.statistics.steps.items())


def test_end_of_sequence_cuts_inside_a_step(copied) -> None:
    base = Engine(copied.folder, threads=1).generate(
        PROMPT, seed=3, strategy="dynamo", backoff_threshold=0.0, max_new_tokens=12, ignore_eos=True
    )
    token = base.tokens[4]  # the middle of the second step of three
    assert token not in base.tokens[:4]
    copied.edit(eos_token_ids=[token])
    engine = Engine(copied.folder, threads=1)
    cut = engine.generate(PROMPT, seed=3, strategy="dynamo", backoff_threshold=0.0, max_new_tokens=12)
    assert cut.tokens == base.tokens[:5]
    assert cut.finish_reason == "eos"
    assert (
        cut.text
        == Engine(copied.folder, threads=1)
        .generate(PROMPT, seed=3, strategy="dynamo", backoff_threshold=0.0, max_new_tokens=4, ignore_eos=True)
        .text
    )
    assert cut.statistics.steps == {3: 1, 2: 1}


def test_stop_strings_cut_inside_a_step_and_nothing_is_taken_back(engine: Engine) -> None:
    options = {"seed": 3, "strategy": "dynamo", "backoff_threshold": 0.0, "max_new_tokens": 60, "ignore_eos": True}
    whole = engine.generate(PROMPT, **options)
    full = whole.text
    assert set(whole.statistics.steps) == {3}  # so that most stops fall inside a step
    cuts = 0
    for start in range(0, len(full) - 3, 5):
        stop = full[start : start + 3]
        engine.reset()
        stream = engine.stream(PROMPT, stop=[stop, "never there"], **options)
        pieces = list(stream)
        assert "".join(pieces) == full[: full.index(stop)] == stream.text
        assert stream.finish_reason == "stop"
        assert all(pieces)
        cuts += len(stream.tokens) % 3 != 0
    assert cuts > 0
    # A stop string that is never completed costs nothing of the text.
    engine.reset()
    assert engine.generate(PROMPT, stop=full[-2:] + "\0\0", **options).text == full


def test_streamed_pieces_are_the_generated_text(engine: Engine) -> None:
    stream = engine.stream(PROMPT, seed=9, max_new_tokens=200, ignore_eos=True)
    pieces = list(stream)
    for piece in pieces:
        piece.encode("utf-8")
    engine.reset()
    assert "".join(pieces) == engine.generate(PROMPT, seed=9, max_new_tokens=200, ignore_eos=True).text
    assert len(pieces) > 10


@pytest.mark.parametrize("chunk", [1, 3, 512])
def test_chunked_prefill_equals_whole(multi: Path, engine: Engine, chunk: int) -> None:
    options = {"seed": 4, "max_new_tokens": 30, "ignore_eos": True}
    expected = engine.generate(PROMPT * 4, **options)
    chunked = Engine(multi, threads=1, prefill_chunk=chunk)
    result = chunked.generate(PROMPT * 4, **options)
    assert result.tokens == expected.tokens
    prompt = len(chunked.encode(PROMPT * 4))
    assert chunked.session.passes == result.statistics.rounds - 1 + -(-prompt // chunk)


def test_common_prefix_is_not_computed_again(engine: Engine) -> None:
    prompt = engine.encode(PROMPT)
    first = engine.generate(prompt, seed=4, max_new_tokens=20, ignore_eos=True)
    assert first.statistics.reused_tokens == 0
    fed: list[int] = []
    step, engine.session.step = (
        engine.session.step,
        lambda tokens, **k: (fed.extend(tokens), step(tokens, **k))[1],
    )
    try:
        longer = prompt + first.tokens[:10] + [7, 8, 9]
        reused = engine.generate(longer, seed=4, max_new_tokens=5, ignore_eos=True)
        assert fed[:3] == [7, 8, 9]
        assert reused.statistics.reused_tokens == len(longer) - 3
        again = engine.generate(longer, seed=4, max_new_tokens=5, ignore_eos=True)
        assert again.statistics.reused_tokens == len(longer) - 1
        other = engine.generate([*prompt[:6], 99, *prompt[6:]], seed=4, max_new_tokens=5, ignore_eos=True)
        assert other.statistics.reused_tokens == 6
    finally:
        del engine.session.step
    engine.reset()
    assert engine.generate(longer, seed=4, max_new_tokens=5, ignore_eos=True).tokens == reused.tokens == again.tokens


def test_growing_cache_equals_one_that_need_not_grow(multi: Path, engine: Engine) -> None:
    options = {"seed": 4, "max_new_tokens": 400, "ignore_eos": True}
    grown = engine.generate(PROMPT, **options)
    small = Engine(multi, threads=1)
    small.session = Session(small.bundle, threads=1, growth=8)
    assert small.generate(PROMPT, **options).tokens == grown.tokens
    assert small.session.cache.capacity != engine.session.cache.capacity


def test_the_context_is_filled_to_its_last_position(multi: Path) -> None:
    engine = Engine(multi, threads=1, max_length=30)
    prompt = list(range(20, 40))
    full = engine.generate(
        prompt, seed=1, max_new_tokens=None, ignore_eos=True, strategy="dynamo", backoff_threshold=0.0
    )
    assert full.finish_reason == "context"
    assert len(full.tokens) == 11  # the last token is never fed
    assert len(engine.generate([1] * 30, max_new_tokens=5, ignore_eos=True).tokens) == 1
    with pytest.raises(PromptError, match="31 tokens, more than the context of 30"):
        engine.generate([1] * 31)


def test_cancelling_ends_after_the_running_pass_and_the_engine_goes_on(engine: Engine) -> None:
    stream = engine.stream(PROMPT, seed=4, max_new_tokens=300, ignore_eos=True)
    pieces = []
    for piece in stream:
        pieces.append(piece)
        if len(pieces) == 3:
            stream.cancel()
    assert stream.finish_reason == "cancelled"
    assert stream.statistics.new_tokens < 60
    assert "".join(pieces) == stream.result().text
    after = engine.generate(PROMPT, seed=4, max_new_tokens=20, ignore_eos=True)
    engine.reset()
    assert after.tokens == engine.generate(PROMPT, seed=4, max_new_tokens=20, ignore_eos=True).tokens


def test_cancelling_during_prefill(multi: Path) -> None:
    engine = Engine(multi, threads=1, prefill_chunk=4)
    stream = engine.stream(PROMPT * 5, max_new_tokens=5)
    stream.cancel()
    assert list(stream) == []
    assert stream.finish_reason == "cancelled"
    assert engine.session.passes == 0


def test_a_stream_that_lost_its_cache_says_so(engine: Engine) -> None:
    stream = engine.stream(PROMPT, seed=4, max_new_tokens=100, ignore_eos=True)
    next(stream)
    engine.generate("x", max_new_tokens=3)
    with pytest.raises(RuntimeError, match="another generation"):
        next(stream)


@pytest.mark.parametrize("strategy", ["autoregressive", "dynamo"])
def test_logits_processors_reach_every_head(engine: Engine, strategy: str) -> None:
    allowed = [40, 41, 42, 43]
    contexts = []

    def only_allowed(context, row):
        contexts.append(len(context))
        out = np.full_like(row, -np.inf)
        out[allowed] = row[allowed]
        return out

    result = engine.generate(
        PROMPT,
        strategy=strategy,
        seed=1,
        max_new_tokens=20,
        logits_processors=[only_allowed],
        **({"cooccurrence_weight": 0.0, "backoff_threshold": 0.1} if strategy == "dynamo" else {}),
    )
    assert set(result.tokens) <= set(allowed)
    assert contexts[0] == result.statistics.prompt_tokens
    if strategy == "dynamo":
        assert result.statistics.tokens_per_pass > 1
        assert len(contexts) == 3 * result.statistics.rounds


def test_top_k_beyond_the_graphs_outputs_reads_the_full_rows(engine: Engine) -> None:
    for strategy in ("autoregressive", "dynamo"):
        result = engine.generate(PROMPT, strategy=strategy, top_k=200, seed=1, max_new_tokens=10, ignore_eos=True)
        assert len(result.tokens) == 10


def test_statistics_add_up(engine: Engine) -> None:
    result = engine.generate(
        PROMPT, seed=2, strategy="dynamo", max_new_tokens=90, ignore_eos=True, backoff_threshold=0.7
    )
    s = result.statistics
    assert len(s.steps) > 1 and s.draft_tokens_accepted > 0
    assert s.new_tokens == len(result.tokens) == 90 == sum(size * count for size, count in s.steps.items())
    assert s.rounds == sum(s.steps.values())
    assert s.tokens_per_pass == 90 / s.rounds
    assert 0 < s.ttft_s < s.total_s
    assert 0 < s.ort_s < s.total_s
    assert s.outside_s == pytest.approx(s.total_s - s.ort_s)
    assert 0 < s.outside_share < 1
    assert s.tokens_per_second == pytest.approx((90 - s.first_tokens) / (s.total_s - s.ttft_s))
    assert "90 new" in s.line()


def test_plain_bundle_drafts_from_the_text_alone(plain: Path, engine: Engine) -> None:
    alone = Engine(plain, threads=1)
    options = {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": 20, "ignore_eos": True}
    result = alone.generate(PROMPT, **options)
    assert result.statistics.strategy == "auto" and set(result.statistics.proposed_by) <= {"lookup"}
    assert result.tokens == engine.generate(PROMPT, strategy="autoregressive", **options).tokens
    with pytest.raises(ParameterError, match="several heads"):
        alone.generate(PROMPT, strategy="dynamo")


def test_wrong_arguments_are_refused_before_anything_runs(engine: Engine) -> None:
    for wrong in (
        {"max_new_tokens": 0},
        {"seed": -1},
        {"stop": ["x", ""]},
        {"strategy": "psychic"},
        {"temperature": float("nan")},
        {"top_k": 0, "strategy": "dynamo"},
        {"warmth": 1},
        {"drafter": "psychic"},
        {"strategy": "speculative", "drafter": "cp"},
        {"strategy": "dynamo", "drafter": "parallel"},
    ):
        with pytest.raises(ParameterError):
            engine.stream(PROMPT, **wrong)
    for prompt in ("", "\ufeff", [], [320], [-1], "x\ud800"):
        with pytest.raises(PromptError):
            engine.stream(prompt)
    assert engine.session.cache.length == 0


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        (["one", "two"], "one text, not a list of them"),
        ([{"role": "user", "content": "x"}], "messages are for Engine.chat"),
        ({"role": "user"}, "not a dict"),
        (b"bytes", "text or token ids, not a bytes"),
        (7, "text or token ids, not a int"),
        (None, "text or token ids, not a NoneType"),
        ([1.0, 2.0], "whole numbers, not 1.0"),
        (np.array([1.5, 2.5]), "whole numbers, not"),
        (np.array([[1, 2], [3, 4]]), "whole numbers, not"),
        ([3, True], "whole numbers, not True"),
        ([np.True_], "whole numbers, not"),
        ([None], "whole numbers, not None"),
    ],
)
def test_what_is_no_prompt_is_one_line(engine: Engine, prompt, message: str) -> None:
    with pytest.raises(PromptError, match=message) as raised:
        engine.generate(prompt)
    assert "\n" not in str(raised.value)


def test_whole_numbers_of_any_kind_are_tokens(engine: Engine) -> None:
    for prompt in (np.array([5, 6, 7]), (5, np.int32(6), np.uint8(7)), iter([5, 6, 7])):
        assert engine.encode(prompt) == [5, 6, 7]
    assert {type(token) for token in engine.encode(np.array([5, 6, 7]))} == {int}


def test_a_byte_order_mark_is_no_part_of_a_prompt(engine: Engine) -> None:
    assert engine.encode("\ufeff" + PROMPT) == engine.encode(PROMPT)
    assert engine.encode("x\ufeff") != engine.encode("x")


def test_nothing_at_all_begins_where_a_text_begins(copied) -> None:
    copied.edit(bos_token_id=0)
    engine = Engine(copied.folder, threads=1)
    for prompt in ("", "\ufeff", []):
        assert engine.encode(prompt) == [0]
    assert len(engine.generate("", max_new_tokens=3, ignore_eos=True).tokens) == 3


def test_a_tokenizer_may_have_added_tokens_without_rows(copied) -> None:
    """They are refused where they occur, not with the bundle."""
    tokenizer = Tokenizer.from_file(str(copied.folder / "tokenizer.json"))
    tokenizer.add_special_tokens(["<|image|>"])
    tokenizer.save(str(copied.folder / "tokenizer.json"))
    copied.relist()
    engine = Engine(copied.folder, threads=1)
    assert engine.encode("x <|im") == engine.bundle.tokenizer.encode("x <|im").ids
    with pytest.raises(PromptError, match="outside 0 … 319"):
        engine.encode("x <|image|>")
    assert max(engine.encode("x <|image|>", plain_prompt=True)) < 320
