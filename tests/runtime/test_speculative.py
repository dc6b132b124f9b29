"""Strategy `speculative` on real graphs: verified drafts change the speed of the text and nothing else."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from support import handmade
from support.dense_heads import DenseHeads

from dynamo_runtime import strategies, verification
from dynamo_runtime.decoding import decode
from dynamo_runtime.device.costs import Knowledge, Prior
from dynamo_runtime.drafting import NOTHING, Guesses, Passed, Proposer
from dynamo_runtime.engine import Engine
from dynamo_runtime.errors import ParameterError
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.sampling import Candidates, Context
from dynamo_runtime.selection import make_strategy
from dynamo_runtime.session import Session
from dynamo_runtime.step import ALL, Step
from dynamo_runtime.strategies import Autoregressive, Speculative
from dynamo_runtime.verification import Draft

N_TOKENS, RANK, VOCAB = 4, 3, 12
WORDS = [7, 2, 9, 4, 11, 1, 5]
GRAPHS: dict[str, dict[str, Any]] = {
    "parallel": {},
    "conditioned": {"conditioned": True},
    "conditioned, of few words": {"conditioned": True, "vocabulary": WORDS},
    "cp": {},
    "cp, of few words": {"vocabulary": WORDS},
    "lookahead": {},
}
CHEAP = Knowledge(Prior(1.0, 0.5, 0.1, 0.0, 0.0), {})


# --- texts, on real graphs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=GRAPHS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session on a small graph of every kind; their first heads are the same function."""
    folder, kind = tmp_path_factory.mktemp("small") / "bundle", request.param.split(",")[0]
    kind, options = kind.replace("conditioned", "parallel"), {"rank": RANK, "sharpness": 6.0, **GRAPHS[request.param]}
    bundle = handmade.small_bundle(folder, kind, N_TOKENS, vocab=VOCAB, **options)
    return Session(bundle, provider="cpu", threads=1)


@pytest.fixture(scope="module")
def plain_session(tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session on the first head alone."""
    bundle = handmade.small_bundle(tmp_path_factory.mktemp("small") / "plain", "plain", 1, vocab=VOCAB, sharpness=6.0)
    return Session(bundle, provider="cpu", threads=1)


def write(session: Session, strategy: object, prompt: list[int], length: int, seed: int = 0) -> tuple[list[int], list]:
    """Tokens and rounds of one generation."""
    session.cache.reset()
    tokens: list[int] = []
    rounds = []
    context = Context(prompt, session.bundle.vocab_size)
    for turn in decode(session, strategy, context, np.random.default_rng(seed)):  # type: ignore[arg-type]
        tokens += turn.tokens
        rounds.append(turn)
        if len(tokens) >= length:
            break
    return tokens[:length], rounds


PARAMETERS = [
    {"temperature": 0.0, "repetition_penalty": 1.0},
    {"temperature": 0.0, "repetition_penalty": 1.3},
    {"temperature": 1.0, "top_k": 0, "repetition_penalty": 1.0},
    {"temperature": 0.8, "top_k": 6, "top_p": 0.9, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 1.3, "top_k": 0, "top_p": 0.95, "repetition_penalty": 0.8, "draft_confidence": 0.05},
    {"temperature": 0.7, "top_k": 0, "draft_tokens": 2, "draft_cooccurrence_weight": 0.0},
]


@pytest.mark.parametrize("changes", PARAMETERS)
def test_certain_drafts_give_the_plain_text_of_the_same_seed(session: Session, plain_session: Session, changes) -> None:
    parameters = SamplingParameters(**changes)
    rng = np.random.default_rng(1)
    proposed = accepted = 0
    for seed in range(8):
        prompt = rng.integers(VOCAB, size=rng.integers(1, 9)).tolist()
        expected, _ = write(plain_session, Autoregressive(plain_session.bundle, parameters), prompt, 40, seed)
        found, rounds = write(session, Speculative(session.bundle, parameters), prompt, 40, seed)
        assert found == expected
        proposed += sum(turn.proposed for turn in rounds)
        accepted += sum(turn.accepted for turn in rounds)
        assert all(len(turn.tokens) == turn.accepted + 1 for turn in rounds)
        assert max(turn.proposed for turn in rounds) <= (parameters.draft_tokens or N_TOKENS - 1)
        if seed < 2:
            auto = make_strategy("auto", session.bundle, parameters, knowledge=CHEAP)
            assert write(session, auto, prompt, 40, seed)[0] == expected
    assert proposed > accepted > 0  # both ways out of a verification were taken


def test_drafts_are_of_the_draft_vocabulary_and_told_what_stands_in_front(tmp_path: Path) -> None:
    """Against numpy: every draft is its head's most probable word behind the token before it."""
    options = {"conditioned": True, "vocabulary": WORDS}
    bundle = handmade.small_bundle(tmp_path / "b", "parallel", N_TOKENS, vocab=VOCAB, **options)
    session, dense = Session(bundle, provider="cpu", threads=1), DenseHeads(bundle)
    parameters = SamplingParameters(top_k=0, temperature=0.9, draft_cooccurrence_weight=0.0)
    context, rng = Context([3, 1, 4], VOCAB), np.random.default_rng(1)
    strategy = Speculative(bundle, parameters)
    told: list[list[int]] = []
    advance = strategy.advance

    def listened(step: Step, known: Context, drafts: Sequence[Any], rng: Any) -> Any:
        turn = advance(step, known, drafts, rng)
        final = [*known.tokens, *(draft.token for draft in drafts[: turn.accepted])]
        states, before = dense.states(final)[-1], turn.tokens[-1]
        expected = []
        for part in range(N_TOKENS - 1):
            before = int(dense.head(states[[part]], part, [before])[0].argmax())
            expected.append(before)
        assert [draft.token for draft in turn.drafts] == expected and set(expected) <= set(WORDS)
        told.append(expected)
        return turn

    strategy.advance = listened  # type: ignore[method-assign]
    for _ in zip(range(12), decode(session, strategy, context, rng), strict=False):
        pass
    assert len({tuple(drafts) for drafts in told}) > 3


CELLS, FEW = 5, [3, 0, 4]


@pytest.fixture(scope="module")
def told(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, np.ndarray]:
    """A session on conditioned heads of few words, and the distribution of the three tokens behind [1, 3]."""
    options = {"conditioned": True, "vocabulary": FEW, "sharpness": 1.5}
    bundle = handmade.small_bundle(tmp_path_factory.mktemp("told") / "b", "parallel", 3, vocab=CELLS, **options)
    dense, joint = DenseHeads(bundle), np.zeros((CELLS,) * 3)
    for text in itertools.product(range(CELLS), repeat=3):
        rows = dense.first([1, 3, *text[:2]])[1:]
        powers = np.exp(rows)
        joint[text] = np.prod((powers / powers.sum(-1, keepdims=True))[range(3), text])
    return Session(bundle, provider="cpu", threads=1), joint


def p_value(told: tuple[Session, np.ndarray], draws: int = 1200) -> float:
    """Chi-square of texts with sampled drafts against plain sampling's distribution."""
    session, joint = told
    parameters = SamplingParameters(
        top_k=0, temperature=1.0, repetition_penalty=1.0, draft_choice="sample", draft_cooccurrence_weight=0.0
    )
    rng, seen, accepted = np.random.default_rng(5), np.zeros_like(joint), 0
    for _ in range(draws):
        session.cache.reset()
        tokens: list[int] = []
        strategy = Speculative(session.bundle, parameters)
        for turn in decode(session, strategy, Context([1, 3], CELLS), rng):
            tokens, accepted = tokens + turn.tokens, accepted + turn.accepted
            if len(tokens) >= 3:
                break
        seen[tuple(tokens[:3])] += 1
    assert accepted > 100
    large = joint * draws >= 5
    observed, expected = seen[large], joint[large] * draws
    rest = draws - expected.sum()
    return float(chisquare(np.append(observed, draws - observed.sum()), np.append(expected, rest)).pvalue)


def test_sampled_drafts_of_few_words_leave_the_distribution_as_it_is(told: tuple[Session, np.ndarray]) -> None:
    assert p_value(told) > 1e-3


@pytest.mark.parametrize("broken", ["always accepted", "no residual", "drawn from another head"])
def test_a_broken_rule_fails_that_test(
    told: tuple[Session, np.ndarray], broken: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def always(drafts: Sequence[Draft], target: Any, uniform: Any) -> tuple[int, int]:
        p = target(len(drafts))
        return len(drafts), int(p.ids[verification.draw(p.probabilities, uniform())])

    propose = Proposer.propose

    def mistaken(*arguments: Any) -> list[Draft]:
        """Says that a draft was drawn from a uniform distribution."""
        drafts = propose(*arguments)
        even = Candidates(np.array(FEW), np.full(len(FEW), 1 / len(FEW)))
        return [Draft(draft.token, even, draft.confidence) for draft in drafts]

    if broken == "always accepted":
        monkeypatch.setattr(strategies, "verify", always)
    elif broken == "no residual":
        monkeypatch.setattr(verification, "residual", lambda p, q: p.probabilities)
    else:
        monkeypatch.setattr(Proposer, "propose", mistaken)
    assert p_value(told) < 1e-4


def test_processors_see_the_drafts_before_their_position(session: Session, plain_session: Session) -> None:
    def no_repeats(context: Sequence[int], logits: np.ndarray) -> np.ndarray:
        logits[list(context[-3:])] = -np.inf
        return logits

    parameters = SamplingParameters(temperature=0.9, top_k=0, repetition_penalty=1.1)
    expected, _ = write(plain_session, Autoregressive(plain_session.bundle, parameters, [no_repeats]), [3, 1], 60)
    found, rounds = write(session, Speculative(session.bundle, parameters, [no_repeats]), [3, 1], 60)
    assert found == expected
    assert sum(turn.accepted for turn in rounds) > 0
    assert all(len(set(found[i : i + 4])) == 4 for i in range(56))


def test_the_context_is_filled_to_its_last_position(session: Session, plain_session: Session) -> None:
    """Drafts and look-ahead tokens make room where the context ends."""
    parameters = SamplingParameters(temperature=0.0, repetition_penalty=1.0)
    short, short_plain = (Session(s.bundle, provider="cpu", max_length=30) for s in (session, plain_session))
    expected, _ = write(short_plain, Autoregressive(plain_session.bundle, parameters), [5, 2, 7], 28)
    found, _ = write(short, Speculative(session.bundle, parameters), [5, 2, 7], 28)
    assert found == expected


def test_rejected_and_look_ahead_tokens_leave_the_cache(session: Session) -> None:
    context = Context([1, 2, 3], VOCAB)
    session.cache.reset()
    strategy = Speculative(session.bundle, SamplingParameters(temperature=0.0))
    for _, turn in zip(range(12), decode(session, strategy, context, np.random.default_rng(0)), strict=False):
        assert session.cache.tokens == context.tokens[:-1]  # the newest token is fed by the next pass
        assert turn.tokens == context.tokens[-len(turn.tokens) :]


def test_the_mask_changes_drafts_but_not_the_text(session: Session, monkeypatch: pytest.MonkeyPatch) -> None:
    texts, drafts = set(), set()
    propose, made = Proposer.propose, list[int]()

    def listened(*arguments: Any, **named: Any) -> list[Draft]:
        found = propose(*arguments, **named)
        made.extend(draft.token for draft in found)
        return found

    monkeypatch.setattr(Proposer, "propose", listened)
    for weight in (0.0, 1.0):
        parameters = SamplingParameters(temperature=0.9, top_k=0, draft_cooccurrence_weight=weight)
        tokens, _ = write(session, Speculative(session.bundle, parameters), [1, 2], 80, seed=5)
        texts.add(tuple(tokens))
        drafts.add(tuple(made))
        made.clear()
    assert len(texts) == 1
    assert len(drafts) == 2


def test_arguments_that_do_not_fit_are_refused(session: Session, plain_session: Session) -> None:
    with pytest.raises(ParameterError, match=r"draft_tokens must be from 0 .* to 3 here"):
        Speculative(session.bundle, SamplingParameters(draft_tokens=4))
    with pytest.raises(ParameterError, match=r"drafter both needs .* plain one"):
        Speculative(plain_session.bundle, SamplingParameters(), drafter="both")
    with pytest.raises(ParameterError, match=r"draft_tokens must be from 0 .* to 15 here"):
        Speculative(plain_session.bundle, SamplingParameters(draft_tokens=16))
    for bad in ({"draft_choice": "beam"}, {"draft_confidence": 1.5}, {"draft_tokens": -1}, {"min_p": 2.0}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            SamplingParameters(**bad)  # type: ignore[arg-type]


# --- through the engine ----------------------------------------------------------------------------------------------

PROMPT = "def fib(n):\n    if n < 2:\n        return n\n"


class AlwaysRight:
    """Drafts what plain decoding is going to write: every draft is accepted."""

    ask = NOTHING

    def __init__(self, prompt: list[int], text: list[int], depth: int):
        self.whole, self.depth = prompt + text, depth

    def guess(self, passed: Passed) -> Guesses:
        known = len(passed.context.tokens) + len(passed.final) - 1

        def candidates(chosen: Sequence[int]) -> Candidates:
            following = self.whole[known + len(chosen) : known + len(chosen) + 1]
            return Candidates(np.array(following, int), np.ones(len(following)))

        return candidates


@pytest.mark.parametrize("strategy", ["autoregressive", "speculative"])
def test_topk_outputs_stand_in_for_full_rows_exactly(engine: Engine, strategy: str, monkeypatch) -> None:
    """With a processor, even one that does nothing, the sampler reads full rows: the draws are the same."""
    options = {
        "temperature": 0.9,
        "top_k": 40,
        "top_p": 0.9,
        "repetition_penalty": 1.2,
        "seed": 3,
        "max_new_tokens": 60,
    }
    full_rows = engine.generate(
        PROMPT, strategy="autoregressive", logits_processors=[lambda _, logits: logits], ignore_eos=True, **options
    )
    engine.reset()
    read: list[int] = []
    original = Step.logits
    monkeypatch.setattr(Step, "logits", lambda step, head=1: read.append(head) or original(step, head))
    found = engine.generate(PROMPT, strategy=strategy, ignore_eos=True, **options)
    assert found.tokens == full_rows.tokens
    assert len(read) < 10  # the top-K outputs nearly always sufficed


@pytest.fixture
def text(engine: Engine) -> list[int]:
    """The plain greedy text."""
    options = {"strategy": "autoregressive", "temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    tokens = engine.generate(PROMPT, **options).tokens
    engine.reset()
    return tokens


@pytest.fixture
def foreseen(engine: Engine, text: list[int]) -> dict[str, Any]:
    """Options with which the plain greedy text is drafted three tokens ahead."""
    drafter = AlwaysRight(engine.encode(PROMPT), text, 3)
    return {"strategy": "speculative", "drafter": drafter, "temperature": 0, "draft_cooccurrence_weight": 0.0}


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 7])
def test_limits_are_exact_inside_accepted_runs(
    engine: Engine, text: list[int], foreseen: dict[str, Any], limit: int
) -> None:
    found = engine.generate(PROMPT, max_new_tokens=limit, ignore_eos=True, **foreseen)
    assert found.tokens == text[:limit]
    assert found.finish_reason == "length"
    assert found.statistics.new_tokens == limit
    assert found.statistics.draft_tokens_accepted <= limit - 1


def test_stop_strings_cancelling_and_streaming_inside_accepted_runs(
    engine: Engine, text: list[int], foreseen: dict[str, Any]
) -> None:
    options = foreseen | {"ignore_eos": True}
    whole = engine.generate(PROMPT, max_new_tokens=24, **options)
    assert whole.tokens == text[:24]
    assert whole.statistics.steps[4] == 5  # 1 + 5 · 4 + the rest
    stop = whole.text[9:12]
    stopped = engine.generate(PROMPT, max_new_tokens=24, stop=stop, **options)
    assert stopped.finish_reason == "stop"
    assert stopped.text == whole.text[: whole.text.index(stop)]
    assert "".join(engine.stream(PROMPT, max_new_tokens=24, **options)) == whole.text
    stream = engine.stream(PROMPT, max_new_tokens=24, **options)
    next(stream)
    stream.cancel()
    list(stream)
    assert stream.finish_reason == "cancelled"
    assert stream.tokens == text[: len(stream.tokens)]


def test_end_of_sequence_ends_an_accepted_run(engine: Engine, text: list[int], foreseen: dict[str, Any]) -> None:
    end = text[6]
    first = text.index(end)
    object.__setattr__(engine.bundle, "eos_token_ids", (end,))
    try:
        found = engine.generate(PROMPT, **foreseen)
    finally:
        object.__setattr__(engine.bundle, "eos_token_ids", (0,))
    assert found.finish_reason == "eos"
    assert found.tokens == text[: first + 1]


def test_statistics_count_drafts_by_depth(engine: Engine, foreseen: dict[str, Any]) -> None:
    s = engine.generate(PROMPT, max_new_tokens=41, ignore_eos=True, **foreseen).statistics
    assert (s.rounds, s.new_tokens) == (11, 41)
    assert s.proposed_at_depth == s.accepted_at_depth == [10, 10, 10]
    assert (s.draft_tokens_proposed, s.draft_tokens_accepted, s.acceptance_rate) == (30, 30, 1.0)
    assert s.acceptance_rate_at_depth == [1.0, 1.0, 1.0]
    assert s.tokens_per_pass == 41 / 11
    assert "30 of 30 draft tokens accepted (by depth 100% 100% 100%)" in s.line()


def test_auto_drafts_with_a_drafter_of_ones_own(
    engine: Engine, text: list[int], foreseen: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine, "knowledge", CHEAP)
    options = foreseen | {"strategy": "auto"}
    found = engine.generate(PROMPT, max_new_tokens=60, ignore_eos=True, **options)
    assert found.tokens == text
    assert found.statistics.draft_tokens_accepted > 20


@pytest.mark.parametrize("choice", ["argmax", "sample"])
def test_log_probabilities_of_drafted_tokens(session: Session, choice: str) -> None:
    """Whatever drafts, accepted or not: the base model's own, as from one pass over all of the text."""
    prompt = [3, 1, 4]
    strategy = Speculative(session.bundle, SamplingParameters(top_k=0, temperature=0.9, draft_choice=choice))
    session.cache.reset()
    context, found, proposed = Context(prompt, VOCAB), [], 0
    rng = np.random.default_rng(2)
    for _, given in zip(range(25), decode(session, strategy, context, rng, scored=True), strict=False):
        found += given.log_probabilities
        assert len(given.log_probabilities) == len(given.tokens)
        proposed += given.proposed - given.accepted
    assert proposed > 0  # rejected
    session.cache.reset()
    rows = session.step(context.tokens[:-1], rows=ALL).logits()[len(prompt) - 1 :].astype(np.float64)
    logs = rows - np.log(np.exp(rows).sum(-1, keepdims=True))
    expected = logs[np.arange(len(rows)), context.tokens[len(prompt) :]]
    assert np.allclose(found, expected, atol=1e-4)
