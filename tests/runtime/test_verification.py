"""The acceptance rule and the drafters, on tables: against exact enumeration and dense arithmetic."""

import itertools
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import handmade
from support.tables import CELLS, TableModel, p_value

from dynamo_runtime import strategies, verification
from dynamo_runtime.cooccurrence import Cooccurrence, load_cooccurrence
from dynamo_runtime.device.costs import Knowledge
from dynamo_runtime.drafting import NO_GUESS, NOTHING, Ask, Combined, Guesses, Passed, Proposer, masked
from dynamo_runtime.joint import JointDrafter, JointHead
from dynamo_runtime.parallel import ParallelDrafter
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.sampling import Candidates, Context
from dynamo_runtime.strategies import Auto, Speculative
from dynamo_runtime.verification import Draft, agreement, residual, verify

KINDS = ("parallel", "cp", "lookahead")


@pytest.fixture(scope="module")
def counted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with n-gram counts, as a bundle's."""
    folder = tmp_path_factory.mktemp("counts")
    handmade.random_counts(folder / "cooccurrence.npz", CELLS, 3, branching=5)
    return folder


@pytest.fixture
def counts(counted: Path) -> Cooccurrence:
    """Those counts."""
    return load_cooccurrence(counted / "cooccurrence.npz")


SAMPLING = {
    "plain": {"repetition_penalty": 1.0},
    "penalty and truncation": {"repetition_penalty": 1.4, "temperature": 0.8, "top_k": 4, "top_p": 0.93, "min_p": 0.05},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["argmax", "sample"])
@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("with_mask", [False, True], ids=["unmasked", "masked"])
def test_the_next_three_tokens_follow_the_target(kind, choice, sampling, with_mask, counted) -> None:
    p, proposed, accepted = p_value(kind, sampling | {"draft_choice": choice}, counted if with_mask else None)
    assert p > 1e-3
    assert proposed > accepted > 0


class Uneasy:
    """Costs at which some drafts pay and others do not, and drafting as such now and then does not."""

    drafting = overhead = 0.0
    making = None

    def step(self, rows: int, with_heads: bool, past: int) -> float:
        return 1.0 + 0.06 * (rows - 1) + 0.02 * with_heads

    def resume(self, skipped: int) -> float:
        return 0.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("choice", ["argmax", "sample"])
def test_planned_drafts_follow_the_target(kind, choice) -> None:
    """Whether a draft is made depends on what is expected of it, and the text must not."""

    def auto(bundle, parameters):
        return Auto(bundle, parameters, knowledge=Knowledge(Uneasy(), {}))

    p, proposed, accepted = p_value(kind, SAMPLING["plain"] | {"draft_choice": choice}, None, make=auto)
    assert p > 1e-3
    assert proposed > accepted > 0


def test_a_sampled_draft_must_not_be_chosen_by_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draft dropped because it turned out unlikely leaves the likely ones, which verification takes for typical."""
    propose = Proposer.propose

    def choosy(*arguments):
        drafts = propose(*arguments)
        likely = [verification.probability(draft.drawn_from, draft.token) > 0.25 for draft in drafts]
        return drafts[: [*likely, False].index(False)]

    changes = SAMPLING["plain"] | {"draft_choice": "sample"}
    confident = p_value("parallel", changes | {"draft_confidence": 0.3}, None)
    assert confident[0] > 1e-3
    assert confident[1] > 0
    monkeypatch.setattr(Proposer, "propose", choosy)
    assert p_value("parallel", changes, None)[0] < 1e-6


@pytest.mark.parametrize("sampling", SAMPLING.values(), ids=SAMPLING)
@pytest.mark.parametrize("rule", ["always", "residual", "bonus"])
def test_a_broken_acceptance_rule_fails_that_test(rule, sampling, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(drafts, target, uniform):
        p = target(len(drafts))
        return len(drafts), int(p.ids[verification.draw(p.probabilities, uniform())])

    def bonus(drafts, target, uniform):  # the rejected draft may come back
        accepted, token = verify(drafts, target, uniform)
        return (accepted, drafts[accepted].token) if accepted < len(drafts) else (accepted, token)

    if rule == "residual":
        monkeypatch.setattr(verification, "residual", lambda p, q: p.probabilities)
    else:
        monkeypatch.setattr(strategies, "verify", locals()[rule])
    assert p_value("parallel", sampling | {"draft_choice": "sample"}, None)[0] < 1e-6


@pytest.mark.parametrize("drawn", [False, True])
def test_agreement_is_verification_of_certain_tokens(drawn: bool) -> None:
    rng = np.random.default_rng(0)
    found = set()
    for _ in range(200):
        tokens = rng.integers(0, 2, 4).tolist()
        guesses = Candidates(np.arange(2), rng.dirichlet(np.ones(2)))
        drafts = [Draft(int(token), guesses if drawn else None) for token in rng.integers(0, 2, 3)]
        expected = verify(drafts, lambda i, t=tokens: Candidates(np.array([t[i]]), np.ones(1)), rng.random)
        assert agreement(drafts, tokens) == expected
        found.add(expected[0])
    assert found == {0, 1, 2, 3}


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


def passed_over(model: TableModel, prompt: list[int]) -> Passed:
    """A pass over a prompt, behind which token 0 became final."""
    model.rollback(0)
    return Passed(model.step(prompt), Context(prompt, CELLS), [0], 0)


def guesses_behind(model: TableModel, prompt: list[int], make: Any) -> Guesses:
    """What a drafter says behind a prompt."""
    guesses = make(model.bundle, SamplingParameters(top_k=0, temperature=1.0)).guess(passed_over(model, prompt))
    assert guesses is not None
    return guesses


def joint_of_drafts(model: TableModel, last: int) -> np.ndarray:
    """What the CP drafter says of (x2, x3) for every x1, by its candidates: [x1, x2, x3]."""
    joint = np.zeros((CELLS,) * 3)
    guesses = guesses_behind(model, [1, last], JointDrafter)
    for x1, x2 in itertools.product(range(CELLS), repeat=2):
        joint[x1, x2] = dense(guesses([x1]))[x2] * dense(guesses([x1, x2]))
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
    cp.bundle = replace(cp.bundle, topology=JointHead(3, 1))
    cp.gate = np.zeros((CELLS, CELLS, 1))
    cp.factors = parallel.heads[:, :, :, None]
    guesses = guesses_behind(parallel, [1, 2], ParallelDrafter)
    expected = dense(guesses([0]))[:, None] * dense(guesses([0, 0]))
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
    guesses = guesses_behind(model, [1, 2], ParallelDrafter)
    heads = [guesses([0] * depth).probabilities[0] for depth in (1, 2)]
    for limit, expected in ((0.0, 2), (heads[0] * heads[1] * 1.01, 1), (heads[0] * 1.01, 0)):
        parameters = SamplingParameters(
            top_k=0, temperature=1.0, draft_confidence=float(limit), draft_cooccurrence_weight=0.0
        )
        strategy = Speculative(model.bundle, parameters)
        model.rollback(0)
        turn = strategy.advance(model.step([1, 2]), Context([1, 2], CELLS), [], np.random.default_rng(0))
        assert len(turn.drafts) == expected


class Certain:
    """Drafts one token for certain, at some depths only."""

    def __init__(self, token: int, depths: Sequence[int], depth: int = 3, ask: Ask = NOTHING):
        self.token, self.depths, self.depth, self.ask = token, depths, depth, ask

    def guess(self, passed: Passed) -> Guesses | None:
        def candidates(chosen: Sequence[int]) -> Candidates:
            return Candidates(np.array([self.token]), np.ones(1)) if len(chosen) in self.depths else NO_GUESS

        return candidates if self.depths else None


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        (Certain(1, [1, 2, 3]), Certain(2, [1, 2, 3]), [1, 1, 1]),
        (Certain(1, [1]), Certain(2, [1, 2, 3]), [1, 2, 2]),  # behind the first one's end
        (Certain(1, [2]), Certain(2, [1, 2, 3]), [2, 1, 2]),
        (Certain(1, []), Certain(2, [1, 2]), [2, 2]),  # the first one has nothing to say of this pass
        (Certain(1, [1, 2, 3], depth=1), Certain(2, [1, 2]), [1, 2]),  # nor behind its depth
        (Certain(1, [1]), Certain(2, [3]), [1]),  # drafts have no gaps
        (Certain(1, []), Certain(2, []), []),
    ],
)
def test_combined_drafters_take_turns(first: Certain, second: Certain, expected: list[int]) -> None:
    parameters = SamplingParameters(draft_cooccurrence_weight=0.0)
    proposer = Proposer(Combined(first, second), parameters, None)
    passed = passed_over(TableModel("plain"), [1, 2])
    drafts = proposer.propose(passed, np.random.default_rng(0), lambda confidences: True)
    assert [draft.token for draft in drafts] == expected


def test_combined_drafters_ask_for_what_both_need() -> None:
    both = Combined(Certain(1, [1], ask=Ask(heads=True)), Certain(2, [1], 5, Ask(look_ahead=range(7, 9))))
    assert (both.depth, both.ask) == (5, Ask(True, range(7, 9)))


@pytest.mark.parametrize("choice", ["argmax", "sample"])
def test_combined_drafts_follow_the_target(choice) -> None:
    """The heads behind a drafter that knows nothing and speaks up now and then."""

    class Now:
        depth, ask = 2, NOTHING

        def guess(self, passed: Passed) -> Guesses | None:
            whims = Candidates(np.arange(CELLS), np.ones(CELLS) / CELLS)
            return (lambda chosen: whims if len(chosen) == 1 else NO_GUESS) if sum(passed.final) % 2 else None

    def combined(bundle, parameters):
        return Speculative(bundle, parameters, drafter=Combined(Now(), ParallelDrafter(bundle, parameters)))

    p, proposed, accepted = p_value("parallel", SAMPLING["plain"] | {"draft_choice": choice}, None, make=combined)
    assert p > 1e-3
    assert proposed > accepted > 0
