"""Algorithm 1: the sparse version that runs against the dense literal one, and its promises."""

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import chisquare
from support import dense_dynamo as dense
from support import handmade
from support.dense_heads import DenseHeads

from dynamo_runtime.cooccurrence import Cooccurrence, load_cooccurrence
from dynamo_runtime.dynamo import check_dynamo, sample_ngram, surviving_joint, walk_counts
from dynamo_runtime.errors import ParameterError
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.sampling import Context, sort_logits, truncate
from dynamo_runtime.selection import make_strategy
from dynamo_runtime.session import Session

VOCAB = 40


@pytest.fixture(scope="module")
def tables(tmp_path_factory: pytest.TempPathFactory) -> dict[int, tuple[Cooccurrence, dense.Counts]]:
    """The same random counts in both forms, by longest order; some tokens never occur."""
    found = {}
    for orders in (2, 3, 4):
        path = tmp_path_factory.mktemp("counts") / f"{orders}.npz"
        handmade.random_counts(path, VOCAB, orders, seed=orders, branching=16)
        found[orders] = load_cooccurrence(path, VOCAB), dense.Counts.from_npz(path)
    return found


def parameters_of(options: dense.Options) -> SamplingParameters:
    return SamplingParameters(
        temperature=options.temperature,
        top_k=options.k,
        top_p=options.top_p,
        repetition_penalty=options.penalty,
        backoff_threshold=options.epsilon_b,
        cooccurrence_weight=options.alpha_c,
        adaptive_threshold=options.adaptive,
        otsu_zeros=options.otsu_zeros,
        normalize_joint=options.normalize,
        premask_test=options.premask_test,
        first_token=options.first_token,
    )


def candidates_of(logits: np.ndarray, parameters: SamplingParameters) -> list:
    return [truncate(*sort_logits(row, parameters.top_k), parameters) for row in logits]


def assert_equal_joint(heads, context, options, table) -> bool:
    """Same surviving set with the same probabilities at every n; returns whether anything survived."""
    counts, literal = table
    parameters = parameters_of(options)
    seen = np.zeros(VOCAB, bool)
    seen[list(context)] = True
    pairs = [(head.ids, head.probabilities) for head in heads]
    survived = False
    for n in range(2, len(heads) + 1):
        if options.alpha_c > 0 and n > counts.orders:
            continue
        walk = walk_counts(heads[:n], counts)[-1] if options.alpha_c > 0 else None
        ours = surviving_joint(heads[:n], seen, parameters, counts, walk)
        theirs = dense.joint(pairs[:n], context, options, literal if options.alpha_c > 0 else None)
        assert (ours is None) == (theirs is None)
        if ours is not None:
            survived = True
            assert np.array_equal(ours.ranks, np.argwhere(theirs))
            assert np.allclose(ours.values, theirs[theirs > 0], rtol=1e-11, atol=0)
    return survived


OPTIONS = list(
    itertools.product(
        (0.0, 0.5, 1.0),  # α_c
        (0.0, 0.02, 0.3, 0.7, 1.0),  # ε_b
        ("blur", "otsu", "none"),
        (True, False),  # zeros in Otsu's population
        (True, False),  # normalised
        ("sole", "all", "none"),
        ("joint", "base"),
    )
)


def test_equals_dense_with_all_options_crossed(tables) -> None:
    rng = np.random.default_rng(0)
    survivors = 0
    for alpha, epsilon, adaptive, zeros, normalize, premask, first_token in OPTIONS:
        options = dense.Options(
            k=int(rng.choice([1, 2, 7, 10])),
            temperature=float(rng.choice([0, 0.7, 1.3])),
            top_p=float(rng.choice([1, 0.9])),
            penalty=float(rng.choice([1.0, 1.1, 3.0, 0.8])),
            epsilon_b=epsilon,
            alpha_c=alpha,
            adaptive=adaptive,
            otsu_zeros=zeros,
            normalize=normalize,
            premask_test=premask,
            first_token=first_token,
        )
        logits = (rng.normal(size=(3, VOCAB)) * rng.choice([0.3, 2, 5])).astype(np.float32)
        context = set(rng.choice(VOCAB, 8, replace=False).tolist())
        table = tables[int(rng.choice([2, 3]))]
        parameters = parameters_of(options)
        heads = candidates_of(logits, parameters)
        for head, row in zip(heads, logits, strict=True):
            ids, probabilities = dense.head_distribution(row, options)
            assert np.array_equal(head.ids, ids)
            assert np.allclose(head.probabilities, probabilities, rtol=1e-13)
        survivors += assert_equal_joint(heads, context, options, table)
        seen = np.zeros(VOCAB, bool)
        seen[list(context)] = True
        for uniform in (0.0, 0.3, 0.77, np.nextafter(1, 0)):
            ours = sample_ngram(heads, seen, uniform, parameters, table[0])
            tokens, J = dense.generate(logits, context, uniform, options, table[1])
            assert ours.tokens == tokens
            ranks = [heads[i].ids.tolist().index(token) for i, token in enumerate(tokens)]
            ranks[0] = 0 if first_token == "base" else ranks[0]  # then the first is settled before the joint is formed
            assert ours.probability == pytest.approx(J[tuple(ranks)] / J.sum(), rel=1e-11)
    assert survivors > len(OPTIONS) / 3  # the comparison was not of nothing with nothing


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_equals_dense_with_four_heads(tables, alpha: float) -> None:
    rng = np.random.default_rng(4)
    lengths = set()
    for epsilon, adaptive in itertools.product((0.0, 0.1, 0.4), ("blur", "otsu", "none")):
        options = dense.Options(k=6, epsilon_b=epsilon, alpha_c=alpha, adaptive=adaptive)
        parameters = parameters_of(options)
        for _ in range(4):
            logits = (rng.normal(size=(4, VOCAB)) * 3).astype(np.float32)
            heads = candidates_of(logits, parameters)
            assert_equal_joint(heads, {1, 2, 3}, options, tables[4])
            seen = np.zeros(VOCAB, bool)
            seen[1:4] = True
            ours = sample_ngram(heads, seen, 0.4, parameters, tables[4][0])
            assert ours.tokens == dense.generate(logits, {1, 2, 3}, 0.4, options, tables[4][1])[0]
            lengths.add(len(ours.tokens))
    assert max(lengths) == 4


def test_equals_dense_on_plateaus(tables) -> None:
    """Equal probabilities: ties in the order of candidates and in Otsu's splits, and blurred plateaus."""
    for adaptive, zeros in itertools.product(("blur", "otsu"), (True, False)):
        options = dense.Options(k=5, epsilon_b=0.0, alpha_c=0.0, adaptive=adaptive, otsu_zeros=zeros, penalty=1.0)
        logits = np.zeros((3, VOCAB), np.float32)
        logits[1, :3] = 1
        heads = candidates_of(logits, parameters_of(options))
        assert assert_equal_joint(heads, set(), options, tables[3])


def test_equals_dense_on_the_outputs_of_a_graph(engine, multi: Path) -> None:
    """The same on logits that a network gave, at the default k of 50."""
    counts = load_cooccurrence(multi.parent / "cooccurrence.npz")
    literal = dense.Counts.from_npz(multi.parent / "cooccurrence.npz")
    prompt = engine.encode("def fib(n):\n    return")
    step = engine.session.step(prompt)
    logits = np.stack([step.logits(head)[-1] for head in (1, 2, 3)])
    seen = np.zeros(counts.vocab_size, bool)
    seen[prompt] = True
    for epsilon, adaptive in ((0.0, "otsu"), (0.1, "blur"), (0.5, "blur")):
        options = dense.Options(epsilon_b=epsilon, adaptive=adaptive)
        parameters = parameters_of(options)
        heads = [truncate(*(a[-1] for a in step.topk(head)), parameters) for head in (1, 2, 3)]
        for uniform in (0.1, 0.6):
            ours = sample_ngram(heads, seen, uniform, parameters, counts)
            assert ours.tokens == dense.generate(logits, set(prompt), uniform, options, literal)[0]


WORDS = list(range(38, 5, -3))
HEADS: dict[str, dict[str, Any]] = {
    "of all words": {},
    "conditioned": {"conditioned": True},
    "of few words": {"vocabulary": WORDS},
    "conditioned, of few words": {"conditioned": True, "vocabulary": WORDS},
}


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("full_rows", ["", "by a processor", "by top_k"])
def test_heads_are_told_the_most_probable_token_in_front(tmp_path: Path, heads: str, full_rows: str) -> None:
    """Dense arithmetic all the way; with first_token "base" the second head is told the token that was chosen."""
    top = {"draft_top_k": 5 if full_rows == "by top_k" else 9}
    bundle = handmade.small_bundle(tmp_path / "b", "parallel", 3, vocab=VOCAB, sharpness=4.0, **HEADS[heads], **top)
    session, reference = Session(bundle, provider="cpu", threads=1), DenseHeads(bundle)
    literal = dense.Counts.from_npz(bundle.folder / "cooccurrence.npz")
    processors = [lambda context, row: row] if full_rows == "by a processor" else []
    rng, lengths = np.random.default_rng(0), set()
    for first_token, alpha, seed in itertools.product(("joint", "base"), (0.0, 1.0), range(6)):
        options = dense.Options(k=9, epsilon_b=0.15, alpha_c=alpha, first_token=first_token, temperature=0.9)
        prompt = rng.integers(0, VOCAB, 12).tolist()
        uniform = np.random.default_rng(seed).random()
        rows = [reference.first(prompt)[-1]]
        told = int(rows[0].argmax())
        if first_token == "base":
            told = dense.generate(rows, set(prompt), uniform, options, literal)[0][0]
        states = reference.states(prompt)[-1]
        for part in range(2):
            rows.append(reference.head(states[[part]], part, [told])[0])
            told = int(rows[-1].argmax())
        expected, _ = dense.generate(rows, set(prompt), uniform, options, literal)
        session.cache.reset()
        strategy = make_strategy("dynamo", bundle, parameters_of(options), processors)
        step = session.step(prompt)
        turn = strategy.advance(step, Context(prompt, VOCAB), [], np.random.default_rng(seed))
        assert turn.tokens == expected
        assert set(turn.tokens[1:]) <= set(HEADS[heads].get("vocabulary", range(VOCAB)))
        lengths.add(len(expected))
        if alpha:  # with the token that stands in a text
            length = strategy.length(step, Context(prompt, VOCAB), -1, expected[0])
            assert length == len(expected) or first_token == "base"
    assert max(lengths) > 1


def test_search_and_scan_of_the_trie_agree(tables) -> None:
    counts, literal = tables[3]
    rng = np.random.default_rng(2)
    tokens = rng.choice(VOCAB, 12, replace=False)
    found = {}
    for children in (0, 10**6):
        parent, rank, nodes = counts.extend(2, np.arange(VOCAB), tokens, children_per_search=children)
        deeper = counts.extend(3, nodes, tokens, children_per_search=children)
        grams = {
            (int(parent[p]), int(tokens[rank[p]]), int(tokens[r]), int(node))
            for p, r, node in zip(*deeper, strict=True)
        }
        found[children] = grams
    assert found[0] == found[10**6]
    wanted = {g for g in literal.counts[3] if g[1] in tokens and g[2] in tokens}
    assert {gram[:3] for gram in found[0]} == wanted


def test_continuations_of_one_node_are_those_it_has_among_many(tables) -> None:
    counts, _ = tables[3]
    rng = np.random.default_rng(5)
    parents, _, grams = counts.extend(2, np.arange(VOCAB), np.arange(VOCAB))
    for order, nodes in ((2, np.arange(VOCAB)), (3, grams)):
        for size in (1, 3, VOCAB):
            tokens = rng.permutation(VOCAB)[:size]
            parent, rank, found = counts.extend(order, nodes, tokens)
            for place in range(0, len(nodes), 3):
                _, alone_rank, alone = counts.extend(order, nodes[place : place + 1], tokens)
                assert np.array_equal(alone_rank, rank[parent == place])
                assert np.array_equal(alone, found[parent == place])
    assert len(set(parents)) < VOCAB  # some have none


def test_threshold_one_gives_one_token_and_zero_gives_all_seen(tables) -> None:
    counts, literal = tables[3]
    rng = np.random.default_rng(5)
    seen = np.zeros(VOCAB, bool)
    full = 0
    for _ in range(60):
        logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
        one = SamplingParameters(top_k=1 if rng.random() < 0.5 else 8, backoff_threshold=1.0)
        assert len(sample_ngram(candidates_of(logits, one), seen, 0.5, one, counts).tokens) == 1
        every = SamplingParameters(top_k=8, backoff_threshold=0.0)
        heads = candidates_of(logits, every)
        ids = [head.ids.tolist() for head in heads]
        expected = max(
            n for n in (1, 2, 3) if n == 1 or any(g in literal.counts[n] for g in itertools.product(*ids[:n]))
        )
        assert len(sample_ngram(heads, seen, 0.5, every, counts).tokens) == expected
        full += expected == 3
    assert full > 20


def test_sole_survivor_must_have_been_likely_before_the_mask(tmp_path: Path) -> None:
    """One counted pair alone has J = 1; whether it is emitted hangs on its probability before the mask."""
    path = tmp_path / "one.npz"
    offsets = np.zeros(VOCAB + 1, int)
    offsets[4:] = 1
    np.savez(
        path,
        totals=[100, 100],
        min_count=[1, 1],
        counts_1=np.full(VOCAB, 5),
        offsets_2=offsets,
        ids_2=[7],
        counts_2=[2],
    )
    counts = load_cooccurrence(path, VOCAB)
    logits = np.zeros((2, VOCAB), np.float32)  # every pair has 1/k² before the mask
    seen = np.zeros(VOCAB, bool)
    for test, expected in (("sole", 1), ("all", 1), ("none", 2)):
        parameters = SamplingParameters(top_k=10, backoff_threshold=0.5, premask_test=test)
        assert len(sample_ngram(candidates_of(logits, parameters), seen, 0.5, parameters, counts).tokens) == expected
    likely = np.zeros((2, VOCAB), np.float32)
    likely[0, 3] = likely[1, 7] = 9
    parameters = SamplingParameters(top_k=10, backoff_threshold=0.5)
    assert sample_ngram(candidates_of(likely, parameters), seen, 0.5, parameters, counts).tokens == [3, 7]


def test_draws_follow_the_joint(tables) -> None:
    """Chi-square of 8,000 draws against the dense joint."""
    counts, literal = tables[3]
    rng = np.random.default_rng(11)
    options = dense.Options(k=6, epsilon_b=0.0, adaptive="none", temperature=1.5)
    parameters = parameters_of(options)
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    heads = candidates_of(logits, parameters)
    seen = np.zeros(VOCAB, bool)
    seen[::3] = True
    J = dense.joint([(h.ids, h.probabilities) for h in heads], set(range(0, VOCAB, 3)), options, literal)
    assert J is not None
    expected = {
        tuple(int(h.ids[i]) for h, i in zip(heads, index, strict=True)): J[tuple(index)] / J.sum()
        for index in np.argwhere(J)
    }
    draws = 8_000
    drawn = [tuple(sample_ngram(heads, seen, u, parameters, counts).tokens) for u in rng.random(draws)]
    observed = dict.fromkeys(expected, 0)
    for gram in drawn:
        observed[gram] += 1
    common = [gram for gram, p in expected.items() if p * draws >= 5]
    assert len(common) >= 3
    rest = 1 - sum(expected[gram] for gram in common)
    pairs = [(observed[gram], expected[gram] * draws) for gram in common]
    if rest * draws >= 5:
        pairs.append((draws - sum(o for o, _ in pairs), rest * draws))
    statistic = sum((o - e) ** 2 / e for o, e in pairs)
    freedom = len(pairs) - 1
    assert statistic < freedom + 4 * np.sqrt(2 * freedom) + 6


def test_first_token_as_plain_draws_it(tables) -> None:
    """Chi-square of 6,000 first tokens against f^1, whatever follows them; drawn from the joint they fail it."""
    rng = np.random.default_rng(12)
    logits = rng.normal(size=(3, VOCAB)).astype(np.float32)
    uniforms, seen = rng.random(6_000), np.zeros(VOCAB, bool)
    passed = {}
    for first_token in ("base", "joint"):
        parameters = SamplingParameters(
            top_k=8, backoff_threshold=0.2, temperature=1.0, repetition_penalty=1.0, first_token=first_token
        )
        heads = candidates_of(logits, parameters)
        ngrams = [sample_ngram(heads, seen, u, parameters, tables[3][0]).tokens for u in uniforms]
        assert max(len(tokens) for tokens in ngrams) > 1
        observed = [sum(tokens[0] == token for tokens in ngrams) for token in heads[0].ids]
        passed[first_token] = chisquare(observed, heads[0].probabilities * len(ngrams)).pvalue > 0.001
    assert passed == {"base": True, "joint": False}


def test_refuses_what_cannot_run() -> None:
    with pytest.raises(ParameterError, match="n-gram counts"):
        check_dynamo(SamplingParameters(), 3, None)
    with pytest.raises(ParameterError, match="top_k"):
        check_dynamo(SamplingParameters(top_k=0, cooccurrence_weight=0.0), 3, None)
    with pytest.raises(ParameterError, match="too many"):
        check_dynamo(SamplingParameters(backoff_threshold=0.0, cooccurrence_weight=0.0), 4, None)
    check_dynamo(SamplingParameters(backoff_threshold=0.0, cooccurrence_weight=0.0), 3, None)
    check_dynamo(SamplingParameters(cooccurrence_weight=0.0), 8, None)


def test_eight_heads_without_mask_at_the_default_threshold() -> None:
    rng = np.random.default_rng(8)
    parameters = SamplingParameters(cooccurrence_weight=0.0)
    logits = rng.normal(size=(8, 500)).astype(np.float32)
    best = rng.integers(0, 500, 8)
    logits[np.arange(8), best] = 30
    seen = np.zeros(500, bool)
    assert sample_ngram(candidates_of(logits, parameters), seen, 0.5, parameters, None).tokens == best.tolist()
