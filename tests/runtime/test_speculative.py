"""Verified drafts change the speed and nothing else: equality of texts, and of distributions."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import handmade
import numpy as np
import pytest
from scipy import stats

from dynamo_runtime import strategies, verification
from dynamo_runtime.bundle import Bundle
from dynamo_runtime.cooccurrence import Cooccurrence, load_cooccurrence
from dynamo_runtime.drafters import ParallelHeads, masked, propose
from dynamo_runtime.engine import Engine, decode
from dynamo_runtime.errors import ParameterError
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.sampling import Candidates, Context
from dynamo_runtime.session import Session, Step
from dynamo_runtime.strategies import Autoregressive, Speculative
from dynamo_runtime.verification import Draft, residual, verify

KINDS = ("parallel", "cp", "lookahead")
N_TOKENS, RANK, VOCAB = 4, 3, 12


# --- texts, on real graphs -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=KINDS)
def session(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A session on a small graph of every kind; their first heads are the same function."""
    folder = tmp_path_factory.mktemp("small") / request.param
    bundle = handmade.small_bundle(folder, request.param, N_TOKENS, vocab=VOCAB, rank=RANK, sharpness=6.0)
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
    assert proposed > accepted > 0  # both ways out of a verification were taken


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


# --- distributions, on tables ----------------------------------------------------------------------------------------

CELLS = 5  # vocabulary of the tables


class TableModel:
    """A language model and its drafters as tables of the last two tokens; quacks like a session."""

    def __init__(self, kind: str, seed: int = 0):
        rng = np.random.default_rng(seed)
        n = 3
        look_ahead = n - 1 if kind == "lookahead" else 0
        ids = CELLS + look_ahead
        self.base = rng.normal(size=(ids, ids, CELLS)) * 1.2
        near = self.base[:, :, None] * 0.5
        self.heads = near + rng.normal(size=(ids, ids, n, CELLS))  # somewhat like the base, so that drafts pass
        self.factors = near[:, :, None] + rng.normal(size=(ids, ids, n, RANK, CELLS))
        self.gate = np.log(rng.dirichlet(np.ones(RANK), size=(ids, ids)))
        self.bundle = Bundle(
            folder=Path(),
            n_heads=n if kind == "parallel" else 1,
            vocab_size=CELLS,
            context_length=99,
            kv_layers=1,
            kv_heads=1,
            head_size=1,
            kind=kind,
            n_tokens=n,
            rank=RANK,
            top_k_outputs=CELLS,
        )
        self.max_length = 99
        self.held: list[int] = []
        self.cache = SimpleNamespace(rollback=self.rollback)
        self.rollback(0)

    def rollback(self, length: int) -> None:
        del self.held[length:]
        self.cache.length = length

    def step(self, tokens: list[int], rows: int, head_rows: Sequence[int] | None) -> Step:
        self.held += tokens
        self.cache.length = len(self.held)
        begin = len(self.held) - len(tokens)
        pairs = [(self.held[i - 1] if i else 0, self.held[i]) for i in range(begin, len(self.held))]
        arrays = {"logits": np.array([self.base[pair] for pair in pairs[-rows:]])}
        if head_rows is not None and self.bundle.kind == "parallel":
            for head in (2, 3):
                arrays[f"logits_{head}"] = np.array([self.heads[pairs[row]][head - 1] for row in head_rows])
        if head_rows is not None and self.bundle.kind == "cp":
            arrays["factor_logits"] = np.array([self.factors[pairs[row]] for row in head_rows])
            arrays["gate"] = np.array([self.gate[pairs[row]] for row in head_rows])
        for name, logits in list(arrays.items()):
            if name != "gate":
                order = np.argsort(-logits, axis=-1, kind="stable")
                arrays[name.replace("logits", "topk_ids")] = order
                arrays[name.replace("logits", "topk_logits")] = np.take_along_axis(logits, order, -1)
        return Step(arrays)


def exact_joint(model: TableModel, prompt: list[int], p: SamplingParameters) -> np.ndarray:
    """Distribution of the next three tokens of plain sampling, [cells, cells, cells], written out densely."""

    def target(context: list[int]) -> np.ndarray:
        logits = model.base[context[-2], context[-1]].copy()
        for token in set(context):
            logits[token] = (
                logits[token] / p.repetition_penalty if logits[token] > 0 else logits[token] * p.repetition_penalty
            )
        probabilities = np.exp(logits / p.temperature)
        order = np.argsort(-probabilities)
        if p.top_k:
            probabilities[order[p.top_k :]] = 0
        probabilities /= probabilities.sum()
        reached = 0.0
        kept = probabilities.copy()
        for token in order:
            if reached >= p.top_p:
                kept[token] = 0
            reached += probabilities[token]
        kept /= kept.sum()
        kept[kept < p.min_p * kept.max()] = 0
        return kept / kept.sum()

    joint = np.zeros((CELLS,) * 3)
    for x1, x2, x3 in itertools.product(range(CELLS), repeat=3):
        first, second, third = (target([*prompt, *before]) for before in ([], [x1], [x1, x2]))
        joint[x1, x2, x3] = first[x1] * second[x2] * third[x3]
    return joint


def p_value(kind: str, changes: dict, counts: Cooccurrence | None, draws: int = 4000) -> tuple[float, int, int]:
    """Chi-square of the next three tokens, drafted and verified, against the exact joint; and the draft counts."""
    model = TableModel(kind)
    parameters = SamplingParameters(**({"top_k": 0, "temperature": 1.0} | changes))
    strategy = Speculative(model.bundle, parameters)
    strategy._counts = counts
    prompt, rng = [1, 3], np.random.default_rng(7)
    seen = np.zeros((CELLS,) * 3)
    proposed = accepted = 0
    for _ in range(draws):
        model.rollback(0)
        tokens: list[int] = []
        for turn in decode(model, strategy, Context(prompt, CELLS), rng):  # type: ignore[arg-type]
            tokens += turn.tokens
            proposed, accepted = proposed + turn.proposed, accepted + turn.accepted
            if len(tokens) >= 3:
                break
        seen[tuple(tokens[:3])] += 1
    expected = exact_joint(model, prompt, parameters) * draws
    if seen[expected == 0].sum() > 0:
        return 0.0, proposed, accepted  # an impossible text was written
    order = np.argsort(expected, axis=None)[::-1]
    large = order[expected.ravel()[order] >= 5]
    observed, wanted = seen.ravel()[large], expected.ravel()[large]
    rest = draws - wanted.sum()
    if rest > 1e-9:  # cells too rare for the statistic count as one
        observed, wanted = np.append(observed, draws - observed.sum()), np.append(wanted, rest)
    return stats.chisquare(observed, wanted).pvalue, proposed, accepted


@pytest.fixture(scope="module")
def counts(tmp_path_factory: pytest.TempPathFactory) -> Cooccurrence:
    path = tmp_path_factory.mktemp("counts") / "cooccurrence.npz"
    handmade.random_counts(path, CELLS, 3, branching=5)
    return load_cooccurrence(path)


SAMPLING = {
    "plain": {"repetition_penalty": 1.0},
    "penalty and truncation": {"repetition_penalty": 1.4, "temperature": 0.8, "top_k": 4, "top_p": 0.93, "min_p": 0.05},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["argmax", "sample"])
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("with_mask", [False, True], ids=["unmasked", "masked"])
def test_the_next_three_tokens_follow_the_target(kind, choice, sampling, with_mask, counts) -> None:
    p, proposed, accepted = p_value(kind, sampling | {"draft_choice": choice}, counts if with_mask else None)
    assert p > 1e-3
    assert proposed > accepted > 0


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("rule", ["always", "certain", "residual", "bonus"])
def test_a_broken_acceptance_rule_fails_that_test(rule, sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(drafts, target, uniform):
        p = target(len(drafts))
        return len(drafts), int(p.ids[verification.draw(p.probabilities, uniform())])

    def certain(drafts, target, uniform):  # a sampled draft is taken for one that was certain
        return verify([Draft(draft.token) if i else draft for i, draft in enumerate(drafts)], target, lambda: 0.5)

    def bonus(drafts, target, uniform):  # the rejected draft may come back
        accepted, token = verify(drafts, target, uniform)
        return (accepted, drafts[accepted].token) if accepted < len(drafts) else (accepted, token)

    if rule == "residual":
        monkeypatch.setattr(verification, "residual", lambda p, q: p.probabilities)
    else:
        monkeypatch.setattr(strategies, "verify", locals()[rule])
    assert p_value("parallel", sampling | {"draft_choice": "sample"}, None)[0] < 1e-6


def test_the_mask_changes_drafts_but_not_the_text(session: Session) -> None:
    texts, drafts = set(), set()
    for weight in (0.0, 1.0):
        parameters = SamplingParameters(temperature=0.9, top_k=0, draft_cooccurrence_weight=weight)
        tokens, rounds = write(session, Speculative(session.bundle, parameters), [1, 2], 80, seed=4)
        texts.add(tuple(tokens))
        drafts.add(tuple(turn.accepted for turn in rounds))
    assert len(texts) == 1
    assert len(drafts) == 2


# --- the pieces ------------------------------------------------------------------------------------------------------


def dense(candidates: Candidates) -> np.ndarray:
    return np.bincount(candidates.ids, candidates.probabilities, CELLS)


def test_residual_is_the_dense_one() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        p, q = (
            Candidates(rng.permutation(CELLS)[:size], rng.dirichlet(np.ones(size))) for size in rng.integers(1, 6, 2)
        )
        expected = np.maximum(dense(p) - dense(q), 0)
        if expected.sum() > 0:
            assert np.allclose(np.bincount(p.ids, residual(p, q), CELLS), expected)
        else:
            assert np.array_equal(residual(p, q), p.probabilities)


def joint_of_drafts(model: TableModel, choice_rank: int) -> np.ndarray:
    """What the CP drafter says of (x2, x3) for every x1, by its candidates: [x1, x2, x3]."""
    drafter = Speculative(model.bundle, SamplingParameters(top_k=0, temperature=1.0))._drafter
    joint = np.zeros((CELLS,) * 3)
    for x1, x2 in itertools.product(range(CELLS), repeat=2):
        model.rollback(0)
        assert drafter.start(model.step([1, choice_rank], 1, [-1]), 0, 0)
        second = dense(drafter.candidates(1, x1))
        joint[x1, x2] = second[x2] * dense(drafter.candidates(2, x2))
    return joint


def test_the_joint_head_is_sampled_exactly() -> None:
    """Sequential re-weighting gives the conditional of the dense mixture Σ_α w_α Π_s p_α^(s)."""
    model = TableModel("cp")
    w = np.exp(model.gate[1, 2])
    p = np.exp(model.factors[1, 2])
    p /= p.sum(-1, keepdims=True)
    tensor = np.einsum("a,ax,ay,az->xyz", w, p[0], p[1], p[2])
    assert np.isclose(tensor.sum(), 1)
    conditional = tensor / tensor.sum((1, 2), keepdims=True)
    assert np.allclose(joint_of_drafts(model, 2), conditional)


def test_rank_one_is_independent_heads() -> None:
    cp, parallel = TableModel("cp"), TableModel("parallel")
    cp.gate = np.zeros((CELLS, CELLS, 1))
    cp.factors = parallel.heads[:, :, :, None]
    step = parallel.step([1, 2], 1, [-1])
    heads = ParallelHeads(parallel.bundle, SamplingParameters(top_k=0, temperature=1.0))
    heads.start(step, 0, 0)
    expected = dense(heads.candidates(1, 0))[:, None] * dense(heads.candidates(2, 0))
    assert np.allclose(joint_of_drafts(cp, 2), expected[None])


def test_the_mask_is_the_ratio_of_the_counts(tmp_path: Path) -> None:
    """Against Eq. 6 written out from the file's own arrays: f(x_2) · (p̂(x_1, x_2) / (p̂(x_1) p̂(x_2)))^α."""
    handmade.random_counts(tmp_path / "cooccurrence.npz", CELLS, 2, branching=5)
    counts = load_cooccurrence(tmp_path / "cooccurrence.npz")
    file = np.load(tmp_path / "cooccurrence.npz")
    unigram = file["counts_1"] / file["totals"][0]
    rng = np.random.default_rng(2)
    f = Candidates(rng.permutation(CELLS), rng.dirichlet(np.ones(CELLS)))
    for before, alpha in itertools.product(range(CELLS), (0.5, 1.0)):
        mask = np.zeros(CELLS)
        for child in range(file["offsets_2"][before], file["offsets_2"][before + 1]):
            after = file["ids_2"][child]
            mask[after] = file["counts_2"][child] / file["totals"][1] / (unigram[before] * unigram[after])
        weights = dense(f) * mask**alpha
        expected = weights / weights.sum() if weights.any() else dense(f)
        assert np.allclose(dense(masked(f, before, counts, alpha)), expected)


def test_a_token_never_counted_leaves_the_candidates_as_they_are(counts: Cooccurrence) -> None:
    f = Candidates(np.arange(1), np.ones(1))
    lonely = [t for t in range(CELLS) if counts.extend(2, np.array([t]), np.arange(1))[0].size == 0]
    assert lonely
    assert masked(f, lonely[0], counts, 1.0) is f


def test_drafting_stops_at_the_confidence_asked_for() -> None:
    model = TableModel("parallel")
    rng = np.random.default_rng(0)
    sure = SamplingParameters(top_k=0, temperature=1.0, draft_cooccurrence_weight=0.0)
    drafter = ParallelHeads(model.bundle, sure)
    drafter.start(model.step([1, 2], 1, [-1]), 0, 0)
    heads = [drafter.candidates(depth, 0).probabilities[0] for depth in (1, 2)]
    for limit, expected in ((0.0, 2), (heads[0] * heads[1] * 1.01, 1), (heads[0] * 1.01, 0)):
        parameters = SamplingParameters(top_k=0, temperature=1.0, draft_confidence=float(limit))
        assert len(propose(drafter, 0, parameters, None, rng)) == expected


def test_arguments_that_do_not_fit_are_refused(session: Session, plain_session: Session) -> None:
    with pytest.raises(ParameterError, match="draft_tokens must be from 1 to 3"):
        Speculative(session.bundle, SamplingParameters(draft_tokens=4))
    with pytest.raises(ParameterError, match="plain one"):
        Speculative(plain_session.bundle, SamplingParameters())
    for bad in ({"draft_choice": "beam"}, {"draft_confidence": 1.5}, {"draft_tokens": -1}, {"min_p": 2.0}):
        with pytest.raises(ParameterError, match=next(iter(bad))):
            SamplingParameters(**bad)  # type: ignore[arg-type]


# --- through the engine ----------------------------------------------------------------------------------------------

PROMPT = "def fib(n):\n    if n < 2:\n        return n\n"


class AlwaysRight:
    """Drafts what plain decoding is going to write: every draft is accepted."""

    def __init__(self, text: list[int], depth: int):
        self.text, self.depth, self.look_ahead = text, depth, ()
        self.at = 0

    def start(self, step: Step, judged: int, accepted: int) -> bool:
        self.at += accepted + 1
        return True

    def candidates(self, depth: int, token: int) -> Candidates:
        place = self.at + depth - 1
        return Candidates(np.array(self.text[place : place + 1]), np.ones(len(self.text[place : place + 1])))


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
def oracle(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The plain greedy text, which the engine's drafter now foresees three tokens ahead."""
    options = {"strategy": "autoregressive", "temperature": 0, "max_new_tokens": 60, "ignore_eos": True}
    text = engine.generate(PROMPT, **options).tokens
    monkeypatch.setattr(strategies, "make_drafter", lambda *_: AlwaysRight(text, 3))
    engine.reset()
    return text


@pytest.mark.parametrize("limit", [1, 2, 4, 5, 7])
def test_limits_are_exact_inside_accepted_runs(engine: Engine, oracle: list[int], limit: int) -> None:
    found = engine.generate(
        PROMPT,
        strategy="speculative",
        temperature=0,
        max_new_tokens=limit,
        ignore_eos=True,
        draft_cooccurrence_weight=0.0,
    )
    assert found.tokens == oracle[:limit]
    assert found.finish_reason == "length"
    assert found.statistics.new_tokens == limit
    assert found.statistics.draft_tokens_accepted <= limit - 1


def test_stop_strings_cancelling_and_streaming_inside_accepted_runs(engine: Engine, oracle: list[int]) -> None:
    options = {"strategy": "speculative", "temperature": 0, "draft_cooccurrence_weight": 0.0, "ignore_eos": True}
    whole = engine.generate(PROMPT, max_new_tokens=24, **options)
    assert whole.tokens == oracle[:24]
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
    assert stream.tokens == oracle[: len(stream.tokens)]


def test_end_of_sequence_ends_an_accepted_run(engine: Engine, oracle: list[int], monkeypatch) -> None:
    end = oracle[6]
    first = oracle.index(end)
    object.__setattr__(engine.bundle, "eos_token_ids", (end,))
    try:
        found = engine.generate(PROMPT, strategy="speculative", temperature=0, draft_cooccurrence_weight=0.0)
    finally:
        object.__setattr__(engine.bundle, "eos_token_ids", (0,))
    assert found.finish_reason == "eos"
    assert found.tokens == oracle[: first + 1]


def test_statistics_count_drafts_by_depth(engine: Engine, oracle: list[int]) -> None:
    s = engine.generate(
        PROMPT, strategy="speculative", temperature=0, max_new_tokens=41, ignore_eos=True, draft_cooccurrence_weight=0.0
    ).statistics
    assert (s.rounds, s.new_tokens) == (11, 41)
    assert s.proposed_at_depth == s.accepted_at_depth == [10, 10, 10]
    assert (s.draft_tokens_proposed, s.draft_tokens_accepted, s.acceptance_rate) == (30, 30, 1.0)
    assert s.acceptance_rate_at_depth == [1.0, 1.0, 1.0]
    assert s.tokens_per_pass == 41 / 11
    assert "30 of 30 draft tokens accepted (by depth 100% 100% 100%)" in s.line()
