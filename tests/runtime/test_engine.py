"""Generation end to end on a real graph: strategies, limits, stops, prefix reuse, cancelling, statistics."""

import copy
import dataclasses
import inspect
from pathlib import Path

import numpy as np
import pytest
from support import dense_dynamo as dense

from dynamo_runtime import Autoregressive, Backend, Engine, ParameterError, PromptError, SamplingParameters, Session
from dynamo_runtime.engine import StreamOptions
from dynamo_runtime.parameters import SamplingOptions
from dynamo_runtime.providers import BackendOptions

PROMPT = "def fib(n):\n    if n < 2:\n        return n\n"


def uncached_logits(engine: Engine, tokens: list[int]) -> np.ndarray:
    """Last rows of all heads, computed from nothing."""
    engine.reset()
    step = engine.session.step(tokens)
    return np.stack([step.logits(head)[-1] for head in range(1, engine.bundle.topology.n_heads + 1)])


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


def test_plain_bundle_decodes_autoregressively_only(plain: Path, engine: Engine) -> None:
    alone = Engine(plain, threads=1)
    options = {"temperature": 0, "repetition_penalty": 1.0, "max_new_tokens": 20, "ignore_eos": True}
    result = alone.generate(PROMPT, **options)
    assert result.statistics.strategy == "autoregressive"
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
    for prompt in ("", [], [320], [-1], "x\ud800"):
        with pytest.raises(PromptError):
            engine.stream(prompt)
    assert engine.session.cache.length == 0


@pytest.mark.parametrize(
    ("strategy", "unread"),
    [
        ("auto", {"backoff_threshold": 0.5}),
        ("auto", {"target_speedup": 1.5}),
        ("autoregressive", {"draft_tokens": 2}),
        ("autoregressive", {"target_speedup": 1.5}),
        ("speculative", {"cooccurrence_weight": 0.0}),
        ("speculative", {"first_token": "base"}),
        ("dynamo", {"draft_choice": "sample"}),
    ],
)
def test_a_parameter_that_the_strategy_does_not_read_is_an_error(engine: Engine, strategy: str, unread: dict) -> None:
    (name,) = unread
    with pytest.raises(ParameterError, match=f"strategy {strategy} does not read {name}: it is for "):
        engine.stream(PROMPT, strategy=strategy, **unread)
    if name != "target_speedup":  # here with the very value that it has by default
        unread = {name: getattr(SamplingParameters(), name)}
        with pytest.raises(ParameterError, match=f"strategy {strategy} does not read {name}"):
            engine.stream(PROMPT, SamplingParameters(**unread), strategy=strategy)


def test_what_nobody_named_is_never_an_error(copied, plain: Path) -> None:
    """Neither the manifest's defaults, nor a field left as it is, nor what the bundle itself says."""
    copied.edit(sampling={"backoff_threshold": 0.3, "draft_tokens": 1, "temperature": 0})
    (copied.folder / "cooccurrence.npz").unlink()
    copied.relist()
    for engine in (Engine(copied.folder, threads=1), Engine(plain, threads=1)):
        bundle = engine.bundle
        again = dataclasses.replace(SamplingParameters(temperature=0.1), top_k=7)
        for strategy in ("auto", "autoregressive", *(("dynamo", "speculative") if bundle.topology.parts else ())):
            for given in (None, SamplingParameters(temperature=0), bundle.parameters({"temperature": 0.2}), again):
                engine.stream(PROMPT, given, strategy=strategy, top_k=None, backoff_threshold=None)


def test_named_is_what_was_named() -> None:
    assert SamplingParameters().named == set()
    assert SamplingParameters(backoff_threshold=0.5, top_k=3).named == {"backoff_threshold", "top_k"}
    assert dataclasses.replace(SamplingParameters(top_k=3), temperature=0.2).named == {"top_k", "temperature"}
    assert copy.deepcopy(SamplingParameters(top_k=50)).named == {"top_k"}
    assert SamplingParameters(top_k=50) == SamplingParameters()


def test_auto_refuses_what_would_do_nothing(copied, plain: Path) -> None:
    """Where nothing can be drafted it decodes plainly, and says so to whoever named something of drafts."""
    copied.edit(quantization={"scheme": "int8-dynamic", "lossless": False}, precision="int8-dynamic")
    for engine in (Engine(plain, threads=1), Engine(copied.folder, threads=1)):
        with pytest.raises(ParameterError, match="auto cannot draft on this bundle, so draft_tokens would do nothing"):
            engine.stream(PROMPT, draft_tokens=1)
        assert engine.generate(PROMPT, max_new_tokens=2).statistics.strategy == "autoregressive"
    with pytest.raises(ParameterError, match="auto drafts nothing on this bundle: it takes no drafter"):
        engine.stream(PROMPT, drafter="parallel")
    with pytest.raises(ParameterError, match="unknown drafter 'psychic'"):
        Engine(plain, threads=1).stream(PROMPT, drafter="psychic")


def test_a_target_speedup_chooses_the_threshold_alone(engine: Engine) -> None:
    for given in ({"backoff_threshold": 0.5}, {"parameters": SamplingParameters(backoff_threshold=0.5)}):
        with pytest.raises(ParameterError, match="give one of them"):
            engine.stream(PROMPT, strategy="dynamo", target_speedup=1.5, **given)


def test_parameters_are_an_object_or_keywords(engine: Engine) -> None:
    options = {"strategy": "autoregressive", "seed": 4, "max_new_tokens": 30, "ignore_eos": True}
    keywords = engine.generate(PROMPT, temperature=1.1, top_k=9, top_p=0.9, **options)
    engine.reset()
    # What the object does not name is the paper's, not the bundle's: here both have a penalty of 1.1.
    found = engine.generate(PROMPT, SamplingParameters(temperature=1.1, top_k=9, top_p=0.9), **options)
    assert found.tokens == keywords.tokens
    engine.reset()
    found = engine.generate(PROMPT, SamplingParameters(temperature=0.2, top_p=0.9), temperature=1.1, top_k=9, **options)
    assert found.tokens == keywords.tokens


def test_an_object_replaces_the_bundles_defaults(copied) -> None:
    copied.edit(sampling={"temperature": 5.0, "top_k": 2})
    engine = Engine(copied.folder, threads=1)
    options = {"strategy": "autoregressive", "seed": 4, "max_new_tokens": 30, "ignore_eos": True}
    theirs = engine.generate(PROMPT, SamplingParameters(), **options).tokens
    engine.reset()
    assert engine.generate(PROMPT, temperature=0.7, top_k=50, **options).tokens == theirs
    engine.reset()
    assert engine.generate(PROMPT, **options).tokens != theirs


def test_keywords_are_typed_completely() -> None:
    """What editors complete is what there is."""
    fields = {field.name for field in dataclasses.fields(SamplingParameters)}
    assert set(SamplingOptions.__annotations__) == fields
    assert set(BackendOptions.__annotations__) == {field.name for field in dataclasses.fields(Backend)}
    named = set(inspect.signature(Engine.stream).parameters) - {"self", "prompt", "parameters", "sampling"}
    assert set(StreamOptions.__annotations__) == named | fields


def test_a_strategy_of_ones_own_has_its_own_parameters(engine: Engine) -> None:
    own = Autoregressive(engine.bundle, SamplingParameters(temperature=0))
    assert len(engine.generate(PROMPT, strategy=own, max_new_tokens=3, ignore_eos=True).tokens) == 3
    for named in ({"temperature": 1.0}, {"parameters": SamplingParameters()}, {"drafter": "parallel"}):
        with pytest.raises(ParameterError, match="a strategy of your own"):
            engine.stream(PROMPT, strategy=own, **named)


@pytest.mark.parametrize("strategy", ["autoregressive", "dynamo", "speculative", "auto"])
def test_log_probabilities_are_the_base_models(engine: Engine, strategy: str) -> None:
    """Of every token, in whatever way it came, as from passes over all of the text before it."""
    options = {"strategy": strategy, "seed": 6, "max_new_tokens": 31, "ignore_eos": True, "temperature": 0.9}
    if strategy == "dynamo":
        options |= {"backoff_threshold": 0.2}
    silent = engine.generate(PROMPT, **options)
    assert silent.log_probabilities == []
    engine.reset()
    found = engine.generate(PROMPT, log_probabilities=True, **options)
    assert found.tokens == silent.tokens  # asking changes nothing
    assert found.statistics.steps == silent.statistics.steps
    assert strategy != "dynamo" or found.statistics.tokens_per_pass > 1.3
    context, expected = engine.encode(PROMPT), []
    for token in found.tokens:
        logits = uncached_logits(engine, context)[0].astype(np.float64)
        expected.append(logits[token] - np.log(np.exp(logits - logits.max()).sum()) - logits.max())
        context.append(token)
    assert found.log_probabilities == pytest.approx(expected, abs=1e-4)


def test_log_probabilities_end_with_the_text(multi: Path, engine: Engine) -> None:
    """Where a stop, a limit or the context ends a text inside a step, and where the engine goes on afterwards."""
    options = {"strategy": "dynamo", "seed": 3, "backoff_threshold": 0.0, "ignore_eos": True, "log_probabilities": True}
    whole = engine.generate(PROMPT, max_new_tokens=30, **options)
    for limit in (1, 2, 3, 5, 7):
        engine.reset()
        cut = engine.generate(PROMPT, max_new_tokens=limit, **options)
        assert len(cut.log_probabilities) == len(cut.tokens) == limit
        assert cut.log_probabilities == pytest.approx(whole.log_probabilities[:limit], abs=1e-4)
    engine.reset()
    stopped = engine.generate(PROMPT, max_new_tokens=30, stop=whole.text[10:13], **options)
    assert len(stopped.log_probabilities) == len(stopped.tokens) < 30
    after = engine.generate(PROMPT, max_new_tokens=30, **options)
    assert after.tokens == whole.tokens
    short = Engine(multi, threads=1, max_length=30)
    full = short.generate(list(range(20, 40)), max_new_tokens=None, **options)
    assert full.finish_reason == "context" and len(full.log_probabilities) == len(full.tokens) == 11
