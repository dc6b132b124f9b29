"""What a caller may say to an engine, what is refused, and log-probabilities on request."""

import copy
import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.ids import without_addresses
from support.uncached import uncached_logits

from dynamo_runtime import Ask, Autoregressive, Backend, Engine, ParameterError, SamplingParameters, Turn, load_bundle
from dynamo_runtime.engine import StreamOptions
from dynamo_runtime.parameters import SamplingOptions
from dynamo_runtime.providers import BackendOptions
from dynamo_runtime.selection import parameters_for

PROMPT = "def fib(n):\n    if n < 2:\n        return n\n"


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
    engine = Engine(copied.folder, threads=1)
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
    # What the object does not name is not the bundle's, which has a penalty of 1.1.
    named = {"top_p": 0.9, "repetition_penalty": 1.1}
    found = engine.generate(PROMPT, SamplingParameters(temperature=1.1, top_k=9, **named), **options)
    assert found.tokens == keywords.tokens
    engine.reset()
    found = engine.generate(PROMPT, SamplingParameters(temperature=0.2, **named), temperature=1.1, top_k=9, **options)
    assert found.tokens == keywords.tokens


def test_parameters_of_another_type_are_refused(engine: Engine) -> None:
    for wrong in ({"temperature": 0}, "dynamo"):
        with pytest.raises(ParameterError, match="parameters must be SamplingParameters, not a"):
            engine.stream(PROMPT, wrong)  # type: ignore[arg-type]


def test_an_object_replaces_the_bundles_defaults(copied) -> None:
    copied.edit(sampling={"temperature": 5.0, "top_k": 2})
    engine = Engine(copied.folder, threads=1)
    options = {"strategy": "autoregressive", "seed": 4, "max_new_tokens": 30, "ignore_eos": True}
    theirs = engine.generate(PROMPT, SamplingParameters(), **options).tokens
    engine.reset()
    assert engine.generate(PROMPT, temperature=0.7, top_k=50, **options).tokens == theirs
    engine.reset()
    assert engine.generate(PROMPT, **options).tokens != theirs


SAMPLING = {"temperature": 5.0, "top_k": 2, "repetition_penalty": 1.3, "backoff_threshold": 0.9}


@pytest.mark.parametrize("strategy", ["auto", "autoregressive", "speculative"])
def test_the_models_own_defaults_are_those_of_every_lossless_strategy(copied, strategy: str) -> None:
    copied.edit(sampling={})
    engine = Engine(copied.folder, threads=1)
    assert SamplingParameters().repetition_penalty == 1.0
    options = {"strategy": strategy, "seed": 4, "max_new_tokens": 40, "ignore_eos": True}
    found = engine.generate(PROMPT, **options).tokens
    engine.reset()
    assert engine.generate(PROMPT, temperature=0.7, top_k=50, repetition_penalty=1.0, **options).tokens == found
    copied.edit(sampling=SAMPLING)
    theirs = Engine(copied.folder, threads=1)
    found = theirs.generate(PROMPT, **options).tokens
    engine.reset()
    assert engine.generate(PROMPT, temperature=5.0, top_k=2, repetition_penalty=1.3, **options).tokens == found


def test_dynamo_has_the_papers_parameters_unless_a_caller_names_others(copied) -> None:
    paper = {"temperature": 0.7, "top_k": 50, "repetition_penalty": 1.1, "backoff_threshold": 0.5}
    copied.edit(sampling=SAMPLING)
    bundle = load_bundle(copied.folder)
    for given, parameters, expected in (
        ({}, None, {}),
        ({"temperature": None}, None, {}),
        ({"repetition_penalty": 1.0}, None, {"repetition_penalty": 1.0}),
        ({}, SamplingParameters(top_k=7), {"top_k": 7}),
        ({"temperature": 0.1}, SamplingParameters(top_k=7, temperature=0.3), {"top_k": 7, "temperature": 0.1}),
        ({}, bundle.parameters({"top_k": 9}), {"top_k": 9}),
    ):
        found = parameters_for("dynamo", bundle, given, parameters)
        assert {name: getattr(found, name) for name in paper} == paper | expected
        assert found.named == set(expected)
    engine, options = Engine(bundle, threads=1), {"strategy": "dynamo", "seed": 4, "max_new_tokens": 40}
    tokens = engine.generate(PROMPT, **options).tokens
    engine.reset()
    assert engine.generate(PROMPT, **paper, **options).tokens == tokens


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


class _Strategy:
    """One of somebody's own, in which something is wrong."""

    name, ask = "own", Ask()

    def __init__(self, **wrong: Any):
        self.__dict__ |= wrong

    def advance(self, *given: Any) -> Any:
        return Turn([1])


class _Drafter:
    """Likewise."""

    depth, ask = 2, Ask()

    def __init__(self, **wrong: Any):
        self.__dict__ |= wrong

    def guess(self, passed: Any) -> Any:
        return None


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"strategy": 3}, "a strategy is a name, or has name, ask and advance, and int has no name"),
        ({"strategy": _Strategy}, "is an object, not the class _Strategy"),
        ({"strategy": _Strategy(ask=None)}, "ask of strategy _Strategy must be an Ask, not a NoneType"),
        ({"strategy": _Strategy(advance=lambda *given: None)}, "must be a Turn of one new token"),
        ({"strategy": _Strategy(advance=lambda *given: Turn([]))}, "one new token or more"),
        ({"strategy": _Strategy(advance=lambda *given: Turn([1], 3))}, "no more drafts accepted than there were"),
        ({"strategy": _Strategy(advance=lambda *given: Turn([320]))}, "has token ids outside 0 … 319"),
        ({"drafter": 3}, "a drafter has depth, ask and guess, and int has no depth"),
        ({"drafter": _Drafter}, "is an object, not the class _Drafter"),
        ({"drafter": _Drafter(depth=1.5)}, "depth of drafter _Drafter must be a whole number of at least 0, not 1.5"),
        ({"drafter": _Drafter(ask=1)}, "ask of drafter _Drafter must be an Ask, not a int"),
        ({"drafter": _Drafter(guess=lambda passed: 7)}, "must be a function, not a int"),
        ({"drafter": _Drafter(guess=lambda passed: lambda chosen: 7)}, "must be Candidates, not a int"),
        ({"seed": 1.5}, "seed must be a whole number of at least 0, not 1.5"),
        ({"seed": "1"}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number of at least 1, not 1.5"),
        ({"max_new_tokens": np.float32(2)}, "max_new_tokens must be a whole number"),
        ({"max_new_tokens": "many"}, "max_new_tokens must be a whole number"),
        ({"stop": 3}, "stop must be text or a list of texts, not a int"),
        ({"stop": b"x"}, "stop must be text or a list of texts, not a bytes"),
        ({"stop": ["x", None]}, "a stop string must be text, not a NoneType"),
        ({"logits_processors": lambda context, row: row}, "logits_processors must be a list of functions"),
        ({"logits_processors": [3]}, "a logits processor must be a function, not a int"),
        ({"ignore_eos": "no"}, "ignore_eos must be true or false, not a str"),
        ({"wait": None}, "wait must be true or false, not a NoneType"),
        ({"draft_choice": np.array([1, 2])}, "draft_choice must be one of argmax, sample, not array"),
        ({"temperature": 10**400}, "temperature must be a finite number"),
        ({"temperature": "hot"}, "temperature must be a finite number, at least 0, not 'hot'"),
        ({"top_k": 1.5}, "top_k must be a whole number of at least 0, not 1.5"),
        ({"top_k": [1]}, "top_k must be a whole number"),
        ({"target_speedup": "2", "strategy": "dynamo"}, "target_speedup must be a number, not a str"),
    ],
    ids=without_addresses,
)
def test_what_is_of_the_wrong_type_is_one_line(engine: Engine, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(message)) as raised:
        engine.generate(
            PROMPT, **({"max_new_tokens": 4, "strategy": "speculative" if "drafter" in wrong else "auto"} | wrong)
        )
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"bundle": 3}, "bundle must be a bundle or its path, not a int"),
        ({"prefill_chunk": 0.5}, "prefill_chunk must be a whole number of at least 1, not 0.5"),
        ({"max_length": 1.5}, "max_length must be a whole number of at least 1, not 1.5"),
        ({"max_length": "all"}, "max_length must be a whole number"),
        ({"threads": "x"}, "threads must be a whole number of at least 1, not 'x'"),
        ({"threads": 10_000}, "threads must be at most "),
        ({"provider": 3}, "provider must be text, not a int"),
        ({"provider_options": "a=b"}, "provider_options must be a mapping, not a str"),
        ({"optimization": ["all"]}, "optimization must be text, not a list"),
        ({"backend": "cpu"}, "backend must be a Backend, not a str"),
        ({"profile": "p.json"}, "profile must be a Profile, not a str"),
    ],
    ids=without_addresses,
)
def test_an_engine_takes_nothing_of_the_wrong_type(multi: Path, wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(ParameterError, match=re.escape(message)):
        Engine(**({"bundle": multi} | wrong))


def test_numbers_of_any_kind_are_numbers(engine: Engine) -> None:
    options: dict[str, Any] = {"strategy": "dynamo", "top_k": 12, "temperature": 0.5, "seed": 3, "max_new_tokens": 9}
    expected = engine.generate(PROMPT, **options).tokens
    options |= {
        "top_k": np.int64(12),
        "temperature": np.float32(0.5),
        "seed": np.int8(3),
        "max_new_tokens": np.int32(9),
    }
    assert engine.generate(PROMPT, **options).tokens == expected
    assert type(SamplingParameters(top_k=np.int64(12)).top_k) is int  # type: ignore[arg-type]
