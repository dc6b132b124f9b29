"""Plain sampling: truncation, penalties, the certificate for the top-K outputs, and the draws themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support import dense_sampling

from dynamo_runtime.errors import ParameterError
from dynamo_runtime.outputs import Outputs
from dynamo_runtime.parameters import SamplingParameters, resolve_parameters
from dynamo_runtime.sampling import (
    Candidates,
    Context,
    Target,
    Truncated,
    _certified_topk,
    draw,
    penalize_repetition,
    sort_logits,
    truncate,
    truncate_row,
)
from dynamo_runtime.step import Step

VOCAB, K = 60, 12


def step_of(logits: np.ndarray) -> Step:
    values, ids = sort_logits(logits, K)
    rows = {"logits": logits, "topk_logits": values, "topk_ids": ids}
    return Step(Outputs({name: row[None, None] for name, row in rows.items()}))


def exact_distribution(logits: np.ndarray, seen: np.ndarray, p: SamplingParameters) -> np.ndarray:
    """The textbook, on full arrays."""
    probabilities = np.zeros(len(logits))
    for token, probability in dense_sampling.distribution(logits, np.flatnonzero(seen).tolist(), p).items():
        probabilities[token] = probability
    return probabilities


def agree(found: Candidates, expected: dict[int, float]) -> None:
    """The same tokens with the same probabilities, in descending order or in that of their ids."""
    assert dict(zip(found.ids.tolist(), found.probabilities.tolist(), strict=True)) == pytest.approx(expected, rel=1e-9)
    descending = np.all(np.diff(found.probabilities) <= 0)
    assert descending or np.all(np.diff(found.ids) > 0)


ROWS = st.lists(
    st.one_of(
        st.sampled_from([-np.inf, -1e30, -3.0, 0.0, -0.0, 1.0, 1.5, 4.0, 1e30]),  # ties, and what is far apart
        st.floats(-20, 20, width=32),
    ),
    min_size=K,
    max_size=VOCAB,
)
PROBABILITIES = st.one_of(st.sampled_from([1e-12, 0.25, 0.5, 0.75, 1 - 1e-12, 1.0]), st.floats(0.001, 1))


@settings(max_examples=500, deadline=None)
@given(
    ROWS.filter(lambda row: max(row) > -np.inf),
    st.lists(st.integers(0, K - 1), max_size=K),
    st.sampled_from([0, 0, 1, 3, K, K + 1, VOCAB]),
    PROBABILITIES,
    st.one_of(st.just(0.0), PROBABILITIES),
    st.sampled_from([0.0, 1e-300, 1e-3, 0.7, 1.0, 5.0]),
    st.sampled_from([1.0, 1.3, 0.7]),
)
def test_distributions_are_those_of_a_full_sort(
    row: list[float], context: list[int], top_k: int, top_p: float, min_p: float, temperature: float, penalty: float
) -> None:
    """Whatever part of the row is read and sorted."""
    parameters = SamplingParameters(
        top_k=top_k, top_p=top_p, min_p=min_p, temperature=temperature, repetition_penalty=penalty
    )
    logits = np.array(row, np.float32)
    expected = dense_sampling.distribution(logits, context, parameters)
    found = Target(parameters).distribution(step_of(logits), Context(context, len(row)))
    if len(found.ids) != len(expected):  # exactly at the border of the nucleus: rounding may decide
        parameters = SamplingParameters(
            top_k=top_k,
            top_p=min(top_p * (1 + 1e-9), 1),
            min_p=min_p * (1 - 1e-9),
            temperature=temperature,
            repetition_penalty=penalty,
        )
        wider = dense_sampling.distribution(logits, context, parameters)
        assert {*expected} ^ {*found.ids.tolist()} <= {*expected} ^ {*wider}
        return
    agree(found, expected)


@pytest.mark.parametrize("spread", [0.0, 0.01, 1.0, 5.0, 40.0])
def test_a_large_row_is_cut_without_being_sorted(spread: float) -> None:
    """From a row in which all are equal to one of which a single token is left."""
    rng = np.random.default_rng(0)
    logits = (rng.normal(size=5000) * spread).astype(np.float32).round(2)  # so that there are ties
    for top_p in (1e-6, 0.3, 0.9, 0.999, 1.0):
        for min_p in (0.0, 0.05):
            parameters = SamplingParameters(temperature=0.9, top_k=0, top_p=top_p, min_p=min_p)
            agree(truncate_row(logits, parameters), dense_sampling.distribution(logits, [], parameters))


def test_a_fork_is_a_context_of_its_own() -> None:
    context = Context([3], VOCAB)
    context.extend([5])
    forks = [context.fork(), context.fork()]
    forks[0].extend([7])
    assert np.flatnonzero(forks[0].seen).tolist() == [3, 5, 7]
    context.extend([9])
    deeper = forks[0].fork()
    deeper.extend([1])
    for each, expected in zip((context, *forks, deeper), ([3, 5, 9], [3, 5, 7], [3, 5], [1, 3, 5, 7]), strict=True):
        assert np.flatnonzero(each.seen).tolist() == sorted(each.tokens) == expected
    forks[1].extend([2])
    assert np.flatnonzero(forks[1].seen).tolist() == [2, 3, 5]
    assert np.flatnonzero(context.seen).tolist() == [3, 5, 9]


@pytest.mark.parametrize("top_k", [0, 5, 12, 30])
@pytest.mark.parametrize("top_p", [1.0, 0.8])
@pytest.mark.parametrize("penalty", [1.0, 1.3, 0.7])
def test_draws_follow_the_exact_distribution(top_k: int, top_p: float, penalty: float) -> None:
    """Evenly spread uniforms leave only rounding: every count is within one of the expected."""
    rng = np.random.default_rng(top_k)
    logits = (rng.normal(size=VOCAB) * 2).astype(np.float32)
    context = Context(rng.choice(VOCAB, 20).tolist(), VOCAB)
    parameters = SamplingParameters(temperature=0.9, top_k=top_k, top_p=top_p, repetition_penalty=penalty)
    sampler = Target(parameters)
    draws = 2000
    counts = np.bincount(
        [sampler.sample(step_of(logits), context, (i + 0.5) / draws) for i in range(draws)], minlength=VOCAB
    )
    expected = exact_distribution(logits, context.seen, parameters)
    assert np.all(np.abs(counts - expected * draws) <= 1 + 1e-3 * draws * expected)
    assert np.all(counts[expected == 0] == 0)


def test_draws_of_a_generator_pass_chi_square() -> None:
    rng = np.random.default_rng(3)
    logits = rng.normal(size=VOCAB).astype(np.float32)
    context = Context([1, 2, 3], VOCAB)
    parameters = SamplingParameters(temperature=1.0, top_k=10)
    sampler, step = Target(parameters), step_of(logits)
    draws = 20_000
    counts = np.bincount([sampler.sample(step, context, u) for u in rng.random(draws)], minlength=VOCAB)
    expected = exact_distribution(logits, context.seen, parameters) * draws
    support = expected > 0
    assert support.sum() == 10
    assert counts[~support].sum() == 0
    assert ((counts - expected)[support] ** 2 / expected[support]).sum() < 27.9  # 9 degrees of freedom, p = 0.001


def test_certified_topk_equals_the_full_row() -> None:
    rng = np.random.default_rng(1)
    certified = refused = 0
    for _ in range(500):
        logits = (rng.normal(size=VOCAB) * 2).astype(np.float32)
        context = Context(rng.choice(VOCAB, rng.integers(1, 30)).tolist(), VOCAB)
        penalty, top_k = float(rng.choice([1.0, 1.1, 2.0, 8.0])), int(rng.integers(1, K + 3))
        found = _certified_topk(step_of(logits), context, penalty, top_k, -1)
        if found is None:
            refused += 1
            continue
        certified += 1
        expected = sort_logits(penalize_repetition(logits, context.seen, penalty), top_k)
        assert np.array_equal(found[0], expected[0])
        assert np.array_equal(found[1], expected[1])
    assert certified > 100
    assert refused > 50


def test_greedy_takes_the_largest_and_processors_are_applied() -> None:
    logits = np.arange(VOCAB, dtype=np.float32)
    greedy = SamplingParameters(temperature=0, repetition_penalty=1.0)
    assert Target(greedy).sample(step_of(logits), Context([3], VOCAB), 0.5) == VOCAB - 1
    asked = []

    def forbid(context, row):
        asked.append(list(context))
        row[-1] = -np.inf
        return row

    assert Target(greedy, [forbid]).sample(step_of(logits), Context([3], VOCAB), 0.5) == VOCAB - 2
    assert asked == [[3]]
    assert logits[-1] == VOCAB - 1  # the step's own row is left as it was
    with pytest.raises(ParameterError, match="not finite"):
        nothing = SamplingParameters()
        Target(nothing, [lambda _, row: row - np.inf]).sample(step_of(logits), Context([3], VOCAB), 0.5)


@settings(deadline=None)
@given(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=K),
    st.sampled_from([0.0, 1e-310, 0.3, 1.0, 4.0]),
    st.integers(0, K),
    st.sampled_from([1.0, 0.9, 0.3]),
    st.sampled_from([0.0, 0.05, 1.0]),
)
def test_the_best_candidate_is_known_without_the_others(
    logits: list[float], temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    row = -np.sort(-np.array(logits, np.float32))
    parameters = SamplingParameters(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    ids = np.arange(len(row)) + 7
    whole, lazy = truncate(row, ids, parameters), Truncated(row.tolist(), ids.tolist(), parameters)
    for uniform in (0.0, 0.1234567, 0.5432109, 0.7654321, 0.9991234):
        assert lazy.draw(uniform) == whole.draw(uniform)
    assert lazy.best == pytest.approx((whole.ids[0], whole.probabilities[0]), rel=1e-9)
    assert whole.best == (whole.ids[0], whole.probabilities[0])
    assert lazy
    assert np.array_equal(lazy.ids, whole.ids)
    assert np.array_equal(lazy.probabilities, whole.probabilities)


def test_a_draft_of_no_number_is_refused() -> None:
    with pytest.raises(ParameterError, match="not finite"):
        _ = Truncated([np.inf, 1.0], [0, 1], SamplingParameters()).best


def test_only_plain_greedy_decoding_is_certain() -> None:
    step = step_of(np.arange(VOCAB, dtype=np.float32))
    greedy = {"temperature": 0.0, "repetition_penalty": 1.0}
    assert Target(SamplingParameters(**greedy)).certain(step) == [VOCAB - 1]
    assert Target(SamplingParameters(**greedy), [lambda _, row: row]).certain(step) is None
    for other in ({"temperature": 1.0}, {"repetition_penalty": 1.1}):
        assert Target(SamplingParameters(**greedy | other)).certain(step) is None
    assert Target(SamplingParameters(temperature=1.0, top_k=1, repetition_penalty=1.0)).certain(step) == [VOCAB - 1]


def test_equal_logits_are_taken_in_the_order_of_ids() -> None:
    logits = np.array([1, 5, 5, 0, 5, 1], np.float32)
    assert sort_logits(logits, 1)[1].tolist() == [1]
    assert sort_logits(logits, 2)[1].tolist() == [1, 2]
    assert sort_logits(logits, 4)[1].tolist() == [1, 2, 4, 0]
    assert sort_logits(logits, 0)[1].tolist() == [1, 2, 4, 0, 5, 3]


def test_truncate_keeps_one_token_at_least_and_survives_tiny_temperatures() -> None:
    logits, ids = np.array([3.0, 2.0, -np.inf], np.float32), np.array([7, 8, 9])
    assert truncate(logits, ids, SamplingParameters(top_p=1e-9)).ids.tolist() == [7]
    cold = truncate(logits, ids, SamplingParameters(temperature=1e-300))
    assert cold.ids.tolist() == [7]
    assert cold.probabilities.tolist() == [1.0]
    assert truncate(logits, ids, SamplingParameters()).ids.tolist() == [7, 8]


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1.0, 1e308])
def test_extreme_logits_and_temperatures_do_not_overflow(temperature: float) -> None:
    """Also where a processor forbids tokens by the smallest number there is."""
    logits = np.array([20.0, 19.0, np.finfo(np.float64).min, -np.inf])
    with np.errstate(over="raise", invalid="raise"):
        for parameters in (SamplingParameters(temperature=temperature, top_p=p) for p in (0.5, 1.0)):
            found = truncate(logits, np.arange(4), parameters)
            agree(truncate_row(logits, parameters), dict(zip(found.ids, found.probabilities, strict=True)))


def test_draw_never_takes_a_zero() -> None:
    weights = np.array([0.0, 0.3, 0.0, 0.7, 0.0])
    assert draw(weights, 0.0) == 1
    assert draw(weights, np.nextafter(1, 0)) == 3
    assert {draw(weights, u) for u in np.linspace(0, 1, 999, endpoint=False)} == {1, 3}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("temperature", v) for v in (-0.1, float("nan"), float("inf"), "hot", True)],
        *[("top_k", v) for v in (-1, 1.5, True)],
        *[("top_p", v) for v in (0, 1.1, float("nan"))],
        *[("repetition_penalty", v) for v in (0, -1, 1e9, float("nan"))],
        *[("backoff_threshold", v) for v in (-0.01, 1.01, float("nan"))],
        *[("cooccurrence_weight", v) for v in (-0.01, 1.01, float("inf"))],
        ("adaptive_threshold", "median"),
        ("premask_test", "some"),
        ("otsu_zeros", 1),
        ("normalize_joint", "yes"),
    ],
)
def test_parameters_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(ParameterError, match=name):
        SamplingParameters(**{name: value})


def test_parameters_come_from_the_caller_then_the_bundle_then_the_paper() -> None:
    defaults = {"temperature": 0.5, "top_k": 20, "some_other_program": 3}
    found = resolve_parameters(defaults, {"top_k": 7, "top_p": None}, has_counts=True)
    assert found == SamplingParameters(temperature=0.5, top_k=7)
    assert resolve_parameters({"cooccurrence_weight": 1.0}, {}, has_counts=False).cooccurrence_weight == 0
    told = resolve_parameters({}, {}, has_counts=True, conditioned=True)
    assert told.draft_cooccurrence_weight == 0 and told.cooccurrence_weight == 1
    asked = resolve_parameters({}, {"draft_cooccurrence_weight": 0.5}, has_counts=True, conditioned=True)
    assert asked.draft_cooccurrence_weight == 0.5
    with pytest.raises(ParameterError, match="unknown parameter heat"):
        resolve_parameters({}, {"heat": 1}, has_counts=True)
