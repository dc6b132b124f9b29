"""Perplexities against sums over distributions that are worked out position by position."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
from support import handmade
from support.dense_heads import DenseHeads

from dynamo_runtime import scoring
from dynamo_runtime.errors import PromptError
from dynamo_runtime.scores import Scores
from dynamo_runtime.scoring import LOOK_AHEAD_STRIDE, score_base, score_texts, score_window
from dynamo_runtime.session import Session
from dynamo_runtime.step import Last

VOCAB, N, RANK = 12, 3, 2
TEXTS = [np.random.default_rng(seed).integers(1, VOCAB, 23).tolist() for seed in range(2)]


@pytest.fixture(scope="module")
def sessions(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Session]:
    """A session of every kind."""
    folder = tmp_path_factory.mktemp("scoring")
    made = {}
    for kind in ("plain", "parallel", "cp", "lookahead"):
        n, rank = (1 if kind == "plain" else N), (RANK if kind == "cp" else 0)
        bundle = handmade.small_bundle(folder / kind, kind, n, vocab=VOCAB, rank=rank)
        made[kind] = Session(bundle, provider="cpu", threads=1)
    return made


def rows_bytes(session: Session) -> int:
    """Bytes of the logits of one position."""
    return 4 * VOCAB * (1 + session.bundle.topology.parts)


def softmax(logits: np.ndarray) -> np.ndarray:
    """Probabilities of one row."""
    powers = np.exp(logits.astype(np.float64) - logits.max())
    return powers / powers.sum()


def after(session: Session, prefix: list[int]) -> np.ndarray:
    """p(x_{t+1}, …, x_{t+n} | prefix) of every continuation, [vocab] * n, from a single pass over the prefix."""
    bundle = session.bundle
    session.cache.reset()
    if bundle.topology.kind == "lookahead":
        rows = session.step([*prefix, *bundle.look_ahead], rows=Last(bundle.topology.n_tokens)).logits()
        each = [softmax(row) for row in rows]
    elif bundle.topology.kind == "cp":
        step = session.step(prefix)
        weights = np.exp(bundle.topology.gate(step.ahead())[0].astype(np.float64))
        joint = np.zeros([VOCAB] * N)
        for component in range(RANK):
            p = [softmax(bundle.topology.factors(step.ahead())[0, i, component]) for i in range(N)]
            joint += weights[component] * p[0][:, None, None] * p[1][None, :, None] * p[2][None, None, :]
        return joint
    else:
        step = session.step(prefix)
        each = [softmax(step.logits(head)[0]) for head in range(1, bundle.topology.n_heads + 1)]
    product = each[0]
    for row in each[1:]:
        product = np.multiply.outer(product, row)
    return product


def first(session: Session, prefix: list[int]) -> np.ndarray:
    """p(x_{t+1} | prefix) of the base's own head."""
    session.cache.reset()
    return softmax(session.step(prefix).logits()[0])


@pytest.mark.parametrize("kind", ["plain", "parallel", "cp", "lookahead"])
def test_against_whole_distributions(kind: str, sessions: dict[str, Session]) -> None:
    """Joint and marginals of every position that has n tokens behind it, by summing over all continuations."""
    session = sessions[kind]
    n = session.bundle.topology.n_tokens
    nll: list[list[float]] = [[] for _ in range(n)]
    choices: list[list[int]] = [[] for _ in range(n)]
    joints = []
    step = LOOK_AHEAD_STRIDE if kind == "lookahead" else 1
    for text in TEXTS:
        for end in range(step, len(text) - n + 1, step):
            joint = after(session, text[:end])
            assert joint.sum() == pytest.approx(1)
            joints.append(-np.log(joint[tuple(text[end : end + n])]))
            for i in range(n):
                p = joint.sum(axis=tuple(axis for axis in range(n) if axis != i))
                p = first(session, text[:end]) if i == 0 else p
                nll[i].append(-np.log(p[text[end + i]]))
                choices[i].append(int(p.argmax()))
    # Passes over a few positions at a time, and over all of them.
    for size in (scoring.BYTES_AT_ONCE, 4 * rows_bytes(session)):
        found = Scores.join([each.scores for text in TEXTS for each in score_window(session, text, at_once=size)])
        np.testing.assert_allclose(found.nll, nll, atol=1e-5)
        np.testing.assert_allclose(found.joint, joints, atol=1e-5)
        np.testing.assert_array_equal(found.choices, choices)
    expected = {f"ppl_{i}": float(np.exp(np.mean(row))) for i, row in enumerate(nll, 1)}
    if n > 1:
        expected[f"ppl_1:{n}"] = float(np.exp(np.mean(joints) / n))
    assert found.perplexities() == pytest.approx(expected, rel=1e-5)


def test_perplexities_of_uniform_choices() -> None:
    """A model that finds 4, 8 and 16 tokens alike likely is as perplexed as that."""
    nll = np.log([[4.0, 4.0], [8.0, 8.0], [16.0, 16.0]])
    found = Scores(nll, nll.sum(0), np.zeros((3, 2), int)).perplexities()
    assert found == pytest.approx({"ppl_1": 4, "ppl_2": 8, "ppl_3": 16, "ppl_1:3": 8})


WORDS = [7, 2, 9, 4, 11, 1, 5, 3]


@pytest.mark.parametrize("conditioned", [False, True])
@pytest.mark.parametrize("vocabulary", [None, WORDS])
def test_further_heads_are_told_the_text_and_score_their_words(
    conditioned: bool, vocabulary: list[int] | None, tmp_path: Path
) -> None:
    """Against numpy: the true token in front, inf outside the table, and means over what is covered."""
    options = {"conditioned": conditioned, "vocabulary": vocabulary}
    bundle = handmade.small_bundle(tmp_path / "b", "parallel", N, vocab=VOCAB, **options)
    session, dense = Session(bundle, provider="cpu", threads=1), DenseHeads(bundle)
    expected: list[list[float]] = [[] for _ in range(N)]
    for text in TEXTS:
        states = dense.states(text)
        for i in range(N):
            for t in range(len(text) - N):
                row = dense.first(text)[t] if i == 0 else dense.head(states[[t], i - 1], i - 1, [text[t + i]])[0]
                with np.errstate(divide="ignore"):
                    expected[i].append(-np.log(softmax(row)[text[t + i + 1]]))
    nll = np.array(expected)
    assert np.isinf(nll[1:]).any() == (vocabulary is not None) and np.isfinite(nll[0]).all()
    for size in (scoring.BYTES_AT_ONCE, 4 * rows_bytes(session)):
        found = Scores.join([each.scores for text in TEXTS for each in score_window(session, text, at_once=size)])
        np.testing.assert_allclose(found.nll, nll, atol=1e-5)
        np.testing.assert_allclose(found.joint, nll.sum(0), atol=1e-5)
    covered = np.isfinite(nll)
    assert found.coverage == covered.mean(1).tolist()
    ppl = {f"ppl_{i}": np.exp(row[own].mean()) for i, (row, own) in enumerate(zip(nll, covered, strict=True), 1)}
    ppl[f"ppl_1:{N}"] = np.exp(nll.sum(0)[covered.all(0)].mean() / N)
    assert found.perplexities() == pytest.approx(ppl, rel=1e-5)


def test_a_joint_head_with_words_of_its_own(tmp_path: Path) -> None:
    """A continuation with a word outside the table cannot be said; the base still scores the first token."""
    bundle = handmade.small_bundle(tmp_path / "b", "cp", N, vocab=VOCAB, rank=RANK, vocabulary=WORDS)
    session = Session(bundle, provider="cpu", threads=1)
    found = score_texts(session, TEXTS[:1])
    text = TEXTS[0]
    for t, joint in enumerate(found.joint):
        whole, following = after(session, text[: t + 1]), text[t + 1 : t + 1 + N]
        assert whole.sum() == pytest.approx(1)
        assert np.isfinite(joint) == (set(following) <= set(WORDS))
        with np.errstate(divide="ignore"):
            assert joint == pytest.approx(-np.log(whole[tuple(following)]), abs=1e-5)
            assert found.nll[2, t] == pytest.approx(-np.log(whole.sum((0, 1))[following[2]]), abs=1e-5)
    assert np.isfinite(found.nll[0]).all() and 0 < found.coverage[1] < 1 == found.coverage[0]


def test_figures_of_nothing_are_left_out() -> None:
    nll = np.array([[1.0, 2.0], [np.inf, 3.0], [np.inf, np.inf]])
    found = Scores(nll, nll.sum(0), np.zeros((3, 2), int))
    assert found.perplexities() == pytest.approx({"ppl_1": np.exp(1.5), "ppl_2": np.exp(3)})
    assert found.coverage == [1.0, 0.5, 0.0]


def test_join(sessions: dict[str, Session]) -> None:
    """Scores of several texts are those of each, one behind the other."""
    session = sessions["parallel"]
    together = score_texts(session, TEXTS)
    apart = [score_texts(session, [text]) for text in TEXTS]
    joined = Scores.join(apart)
    assert joined.nll.shape == (3, 2 * 20) and joined.joint.shape == (40,)
    for name in ("nll", "joint", "choices"):
        np.testing.assert_array_equal(getattr(joined, name), getattr(together, name))
        both = np.concatenate([getattr(each, name) for each in apart], axis=-1)
        np.testing.assert_array_equal(getattr(joined, name), both)


@pytest.mark.parametrize("kind", ["plain", "parallel", "cp", "lookahead"])
def test_bad_texts(kind: str, sessions: dict[str, Session]) -> None:
    """A text needs a token before those that are predicted, and only tokens of the vocabulary."""
    session = sessions[kind]
    n = session.bundle.topology.n_tokens
    for length in range(n + 1):
        with pytest.raises(ValueError, match=f"a text of {length} tokens cannot be scored {n} tokens ahead"):
            score_texts(session, [[1] * length])
    if kind != "lookahead":
        assert score_texts(session, [[1] * (n + 1)]).nll.shape == (n, 1)
    with pytest.raises(PromptError, match="token ids must be from 0"):
        score_texts(session, [[*TEXTS[0], VOCAB + 5, *TEXTS[1]]])


def test_marginals_are_a_mixture(sessions: dict[str, Session]) -> None:
    """With a joint head the joint is more than the product of its marginals, or the test above could not tell."""
    found = score_texts(sessions["cp"], TEXTS)
    assert np.abs(found.joint - found.nll.sum(0)).max() > 1e-3
    pairs = itertools.combinations(score_texts(sessions["cp"], TEXTS).nll, 2)
    assert all(not np.allclose(a, b) for a, b in pairs)


def test_the_cache_is_used_up_to_its_end(tmp_path: Path) -> None:
    """A text as long as the cache is scored; a longer one is refused."""
    bundle = handmade.small_bundle(tmp_path / "plain", "plain", 1, vocab=VOCAB)
    session = Session(bundle, provider="cpu", threads=1, max_length=16)
    assert score_texts(session, [[3] * 16]).nll.shape == (1, 15)
    with pytest.raises(PromptError, match="do not fit into the cache of 16"):
        score_texts(session, [[3] * 18])


@pytest.mark.parametrize("kind", ["plain", "parallel", "cp", "lookahead"])
@pytest.mark.parametrize("rows", [3, 100])
def test_a_window_sees_nothing_before_it(kind: str, rows: int, sessions: dict[str, Session]) -> None:
    """Positions 9 … 15 in a window from 5 are scored as in a text that begins there."""
    session = sessions[kind]
    n = session.bundle.topology.n_tokens
    begin, first, end = 5, 9, 16
    stretches = list(score_window(session, TEXTS[0], begin, first, end, at_once=rows * rows_bytes(session)))
    positions = [t for stretch in stretches for t in stretch.positions]
    stride = LOOK_AHEAD_STRIDE if kind == "lookahead" else 1
    assert positions == [t for t in range(first, end) if (t + 1 - begin) % stride == 0]
    for stretch in stretches:
        for column, t in enumerate(stretch.positions):
            joint = after(session, TEXTS[0][begin : t + 1])
            assert stretch.scores.joint[column] == pytest.approx(
                -np.log(joint[tuple(TEXTS[0][t + 1 : t + 1 + n])]), abs=1e-5
            )


@pytest.mark.parametrize("kind", ["plain", "parallel", "cp", "lookahead"])
def test_the_base_of_every_kind(kind: str, sessions: dict[str, Session]) -> None:
    """The first head alone, up to the last token of a text, in passes over a few positions at a time."""
    session, text = sessions[kind], TEXTS[1]
    nll, choices = score_base(session, text, 7, at_once=4 * VOCAB * 5)
    rows = [first(session, text[: t + 1]) for t in range(7, len(text) - 1)]
    np.testing.assert_allclose(nll, [-np.log(row[text[8 + i]]) for i, row in enumerate(rows)], atol=1e-5)
    np.testing.assert_array_equal(choices, [row.argmax() for row in rows])
    assert score_base(session, text[:1])[0].shape == (0,)
