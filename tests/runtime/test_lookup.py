"""The text as a drafter, alone and with the heads: the text stays what it is, and what does not pay is not fed."""

import itertools
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support.tables import p_value

from dynamo_runtime import (
    Auto,
    Combined,
    Context,
    Engine,
    ParameterError,
    Passed,
    PromptError,
    Speculative,
    earlier,
    load_bundle,
    strategies,
    verification,
)
from dynamo_runtime.cli.run import main
from dynamo_runtime.device.acceptance import Acceptances
from dynamo_runtime.device.copying import Copying
from dynamo_runtime.device.costs import Knowledge, Prior
from dynamo_runtime.device.tuning import DEFAULT
from dynamo_runtime.drafting import Repeat
from dynamo_runtime.earlier import load_earlier
from dynamo_runtime.lookup import Lookup
from dynamo_runtime.parallel import ParallelDrafter
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.repeat_rates import Expected, RepeatRates
from dynamo_runtime.repeats import Occurrences
from dynamo_runtime.verification import Draft, verify

PROMPT = "def fib(n):\n    return fib(n - 1) + fib(n - 2)\n\ndef fib(n):\n    return fib(n - 1) +"
CHEAP = Knowledge(Prior(1.0, 0.5, 0.02, 0.0, 0.0), {})
WAYS = [("speculative", "lookup"), ("auto", "lookup"), ("speculative", "both"), ("auto", None)]
SAMPLING = [
    {"temperature": 0.0},
    {"temperature": 0.3, "repetition_penalty": 0.9, "top_p": 0.95},
    {"temperature": 0.2, "top_k": 5, "draft_confidence": 0.05},
]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("strategy", "drafter"), WAYS)
def test_the_text_is_that_of_plain_decoding(
    multi: Path, plain: Path, strategy: str, drafter: str | None, sampling: dict[str, Any], monkeypatch
) -> None:
    proposed = accepted = 0
    for path in (multi, plain):
        if path is plain and drafter == "both":
            continue
        engine = Engine(path, threads=1)
        monkeypatch.setattr(engine, "knowledge", CHEAP)
        for seed in range(3):
            options = {"seed": seed, "max_new_tokens": 80, "ignore_eos": True}
            limits = {name: value for name, value in sampling.items() if not name.startswith("draft")}
            engine.reset()
            expected = engine.generate(PROMPT, strategy="autoregressive", **options, **limits)
            engine.reset()
            found = engine.generate(PROMPT, strategy=strategy, drafter=drafter, **options, **sampling)
            assert found.tokens == expected.tokens
            proposed += found.statistics.proposed_by["lookup"]
            accepted += found.statistics.accepted_by["lookup"]
    assert proposed > accepted > 0


def test_a_bundle_that_is_not_lossless_is_decoded_plainly(plain: Path) -> None:
    bundle = replace(load_bundle(plain), quantization=SimpleNamespace(lossless=False, degraded=False))
    engine = Engine(bundle, threads=1)
    found = engine.generate(PROMPT, max_new_tokens=20, ignore_eos=True, seed=1)
    assert found.statistics.strategy == "autoregressive"
    assert engine.generate(PROMPT, strategy="speculative", max_new_tokens=20, seed=1).statistics.rounds > 0


# --- distributions, on tables ----------------------------------------------------------------------------------------

REPEATED = (1, 3, 2, 0, 1, 3)  # so that 2 and 0 are drafted


def lookup_only(bundle: Any, parameters: SamplingParameters) -> Speculative:
    return Speculative(bundle, parameters, drafter="lookup")


def both(bundle: Any, parameters: SamplingParameters) -> Speculative:
    return Speculative(bundle, parameters, drafter="both")


def planned(bundle: Any, parameters: SamplingParameters) -> Auto:
    return Auto(bundle, parameters, knowledge=CHEAP)


@pytest.mark.parametrize("choice", ["argmax", "sample"])
@pytest.mark.parametrize("make", [lookup_only, both, planned])
def test_the_next_three_tokens_follow_the_target(make: Any, choice: str) -> None:
    p, proposed, accepted = p_value("parallel", {"draft_choice": choice}, None, make=make, prompt=REPEATED)
    assert p > 1e-3
    assert proposed > accepted > 0


@pytest.mark.parametrize("rule", ["always", "bonus"])
def test_a_broken_rule_fails_that_test(rule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def always(drafts: Sequence[Draft], target: Any, uniform: Any) -> tuple[int, int]:
        p = target(len(drafts))
        return len(drafts), int(p.ids[verification.draw(p.probabilities, uniform())])

    def bonus(drafts: Sequence[Draft], target: Any, uniform: Any) -> tuple[int, int]:  # the rejected one comes back
        accepted, token = verify(drafts, target, uniform)
        return (accepted, drafts[accepted].token) if accepted < len(drafts) else (accepted, token)

    monkeypatch.setattr(strategies, "verify", locals()[rule])
    assert p_value("parallel", {}, None, make=lookup_only, prompt=REPEATED)[0] < 1e-6


# --- what is drafted -------------------------------------------------------------------------------------------------


def passed_over(tokens: Sequence[int], context: Context | None = None) -> Passed:
    """A pass behind which the last of some tokens became final."""
    return Passed(None, context or Context(tokens[:-1], 100), [tokens[-1]], 0)  # type: ignore[arg-type]


def ahead(lookup: Lookup, most: int) -> list[int]:
    return [repeat.token for repeat in itertools.islice(lookup.ahead(), most)]


def test_a_match_goes_on_as_the_text_did_and_repeats_itself_at_the_end() -> None:
    lookup = Lookup()
    lookup.follow(passed_over([1, 2, 3, 4, 5, 1, 2]))
    assert ahead(lookup, 3) == [3, 4, 5]
    assert ahead(lookup, 9) == [3, 4, 5, 1, 2, 3, 4, 5, 1]  # behind the end stands what was drafted
    expected = [repeat.expected for repeat in itertools.islice(lookup.ahead(), 9)]
    assert expected == sorted(expected)  # each is more likely if those before it are right
    lookup.follow(passed_over([1, 2, 3, 4, 5, 6]))
    assert ahead(lookup, 3) == []


def test_it_follows_a_text_and_begins_anew_with_another() -> None:
    context = Context([1, 2, 3, 4, 1], 100)
    lookup = Lookup()
    lookup.follow(Passed(None, context, [2], 0))  # type: ignore[arg-type]
    assert ahead(lookup, 2) == [3, 4]
    context.extend([2])
    lookup.follow(Passed(None, context, [3, 4, 9], 0))  # type: ignore[arg-type]
    assert ahead(lookup, 2) == []
    context.extend([3, 4, 9])
    lookup.follow(Passed(None, context, [3, 4], 0))  # type: ignore[arg-type]
    assert ahead(lookup, 2) == [9, 3]
    lookup.follow(passed_over([7, 8, 7, 8]))
    assert ahead(lookup, 3) == [7, 8, 7]


def test_behind_drafts_of_somebody_else_it_looks_anew() -> None:
    lookup = Lookup()
    lookup.follow(passed_over([1, 2, 3, 4, 5, 6, 1]))
    for drafts, token in (([2], 3), ([3, 4], 5), ([4], None), ([], None)):
        found = lookup.behind(drafts)
        assert (None if found is None else found.token) == token
    assert ahead(lookup, 1) == []  # and nothing of the drafts is kept


def test_a_corpus_is_looked_through_besides() -> None:
    lookup = Lookup(Occurrences([11, 12, 13, 14, 15]))
    lookup.follow(passed_over([1, 2, 11, 12, 13]))
    assert ahead(lookup, 5) == [14, 15]  # nothing stands behind its end
    lookup.follow(passed_over([11, 12, 13, 9, 9, 11, 12, 13]))
    assert ahead(lookup, 2) == [14, 15] or ahead(lookup, 2) == [9, 9]
    assert lookup.behind([9]) is not None


def test_combined_with_a_drafter_of_ones_own(multi: Path) -> None:
    engine = Engine(multi, threads=1)
    options = {"temperature": 0.0, "max_new_tokens": 60, "ignore_eos": True}
    expected = engine.generate(PROMPT, strategy="autoregressive", **options)
    heads = ParallelDrafter(engine.bundle, engine.bundle.parameters({"temperature": 0.0}))
    found = engine.generate(PROMPT, strategy="speculative", drafter=Combined(Lookup(), heads), **options)
    assert found.tokens == expected.tokens and found.statistics.draft_tokens_proposed > 0


def test_every_position_is_of_the_one_that_expects_more(multi: Path) -> None:
    """Over both, as the first pass says it; the confidences are the heads' own and the rates of matches."""
    engine = Engine(multi, threads=1)
    strategy = Speculative(engine.bundle, engine.bundle.parameters({"temperature": 0.7}), drafter="both")
    prompt = engine.encode(PROMPT)
    step = engine.session.step(prompt)
    turn = strategy.advance(step, Context(prompt, engine.bundle.vocab_size), [], np.random.default_rng(0))
    sources = {draft.source for draft in turn.drafts}
    assert sources <= {"lookup", "parallel"} and len(turn.drafts) > 0
    lookup = Lookup()
    lookup.follow(passed_over([*prompt, turn.tokens[-1]]))
    for depth, draft in enumerate(turn.drafts):
        repeat = lookup.behind([each.token for each in turn.drafts[:depth]])
        if draft.source == "lookup":
            assert repeat is None or isinstance(draft.confidence, Expected)
        elif repeat is not None:
            assert draft.confidence >= repeat.expected


# --- what it costs ---------------------------------------------------------------------------------------------------


def test_a_text_that_does_not_repeat_itself_loses_a_hundredth_at_most() -> None:
    """However likely repeats seem to be: what is never right is fed no longer than the account allows."""
    for row in (0.02, 0.15, 0.4):
        costs = Prior(1.0, 0.0, row, 0.0, 0.0)
        copying = Copying(costs, 15, "lookup")
        extra, spent, fed = 0.0, 0.0, 0
        for past in range(500):
            sure = iter([Repeat(1, Expected(0.99))] * 15)
            drafts = copying.chain(sure, past).drafts
            copying.judged(drafts, [2])
            cost = costs.step(1 + len(drafts), False, past)
            extra, spent, fed = extra + cost - 1.0, spent + cost, fed + len(drafts)
        assert fed > 0 and extra <= 0.01 * spent


def test_what_was_not_fed_is_forgiven_as_far_as_it_would_have_paid() -> None:
    costs = Prior(1.0, 0.0, 0.3, 0.0, 0.0)
    for written, lost in (([1, 2, 3], 0.0), ([1, 9, 9], 0.64 - 1.0 + 0.9), ([9, 9, 9], 0.64)):
        copying = Copying(costs, 3, "lookup")
        copying.lost = copying.most
        sure = [Repeat(token, Expected(0.99)) for token in (1, 2, 3)]
        assert copying.chain(iter(sure), 0).drafts == []
        for token in written:
            copying.judged([], [token])
        assert (copying.most, copying.lost) == pytest.approx((0.64, lost))
        assert bool(copying.chain(iter(sure), 0).drafts) == (lost == 0)


def test_rates_are_learnt_without_feeding_anything() -> None:
    rates = RepeatRates()
    before = rates.of(2, 0), rates.of(8, 0)
    for _ in range(40):
        rates.add(2, 0, False)
    assert rates.of(2, 0) < 0.05 and rates.of(8, 0) < 0.5 * before[1]  # others are doubted too
    for _ in range(60):
        rates.add(8, 1, True)
    assert rates.of(8, 1) > 0.9 and rates.of(2, 0) < before[0]
    assert rates.of(40, 0) == rates.of(900, 0)


def test_the_chain_is_the_one_with_the_most_tokens_a_millisecond() -> None:
    """Against all lengths; with nothing at all where no length pays."""
    rng = np.random.default_rng(0)
    for _ in range(200):
        row, depth = rng.uniform(0.02, 0.6), 8
        costs = Prior(1.0, 0.0, row, 0.7, 0.1)
        expected = rng.uniform(0.2, 1.0, depth)
        copying = Copying(costs, depth, "lookup")
        copying.lost = -100.0
        chain = copying.chain(iter([Repeat(7, Expected(each)) for each in expected]), 0)
        tokens = 1 + np.concatenate([[0.0], np.cumsum(np.cumprod(expected))])
        spent = 1.1 + np.arange(depth + 1) * (row + DEFAULT.repeat_share * 0.1)
        best = int(np.argmax(tokens / spent))
        assert len(chain.drafts) == best
        assert chain.gain == pytest.approx(tokens[best] - spent[best] / spent[0])


def test_what_the_text_says_teaches_nothing_about_the_heads() -> None:
    acceptances = Acceptances(2)
    for _ in range(50):
        acceptances.add([Expected(0.9), 0.9], 0)
        acceptances.observe(1, Expected(0.9))
    assert acceptances.of(1, 0.9) == pytest.approx(0.9) and acceptances.usual(1) == pytest.approx(0.5)
    assert acceptances.of(7, Expected(0.3)) == 0.3  # deeper than the heads go


def test_statistics_say_what_came_of_whose_drafts(multi: Path) -> None:
    engine = Engine(multi, threads=1)
    options = {"temperature": 0.0, "max_new_tokens": 80, "ignore_eos": True}
    found = engine.generate(PROMPT, strategy="speculative", drafter="both", **options).statistics
    assert set(found.proposed_by) == {"lookup", "parallel"}
    assert sum(found.proposed_by.values()) == found.draft_tokens_proposed
    assert sum(found.accepted_by.values()) == found.draft_tokens_accepted
    counts = f"lookup {found.accepted_by['lookup']} of {found.proposed_by['lookup']}, parallel"
    assert counts in found.line()


# --- a corpus on the disk --------------------------------------------------------------------------------------------


@pytest.fixture
def corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file of two texts, and an empty cache folder."""
    monkeypatch.setenv("DYNAMO_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("def one(x):\n    y = x", "two of them")))
    return path


def test_a_corpus_is_indexed_once_and_anew_when_it_changes(
    plain: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, made = load_bundle(plain), list[Path]()
    cut = earlier._made
    monkeypatch.setattr(earlier, "_made", lambda path, bundle: made.append(path) or cut(path, bundle))
    tokens = [
        token
        for text in ("def one(x):\n    y = x", "two of them")
        for token in [*bundle.tokenizer.encode(text).ids, -1]
    ]
    first, second = (load_earlier(corpus, bundle) for _ in range(2))
    assert list(first.tokens) == list(second.tokens) == tokens and len(made) == 1
    for ours, theirs in zip(first.arrays(), second.arrays(), strict=True):
        assert np.array_equal(ours, theirs)
    corpus.write_text(json.dumps({"text": "something else"}) + "\n")
    assert list(load_earlier(corpus, bundle).tokens)[:-1] == bundle.tokenizer.encode("something else").ids
    (kept,) = (corpus.parent / "cache/earlier").iterdir()
    for damaged in (b"", kept.read_bytes()[:-4], kept.read_bytes()[:-4] + b"\xff\xff\xff\x7f"):
        kept.write_bytes(damaged)
        assert list(load_earlier(corpus, bundle).tokens)[:-1] == bundle.tokenizer.encode("something else").ids
    assert len(made) == 5


def test_a_corpus_that_cannot_be_kept_is_used_all_the_same(
    plain: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DYNAMO_CACHE", str(corpus))  # a file, in which nothing can be kept
    assert len(load_earlier(corpus, load_bundle(plain)).tokens) > 2


def test_it_drafts_from_the_corpus_and_never_across_its_texts(plain: Path, corpus: Path) -> None:
    bundle = load_bundle(plain)
    lookup = Lookup(load_earlier(corpus, bundle))
    text = bundle.tokenizer.encode("def one(x):\n    y = x").ids
    lookup.follow(passed_over([*text[:-2]]))
    assert ahead(lookup, 9) == text[-2:]
    engine = Engine(plain, threads=1, draft_corpus=corpus)
    options = {"temperature": 0.0, "max_new_tokens": 40, "ignore_eos": True}
    for strategy in ("speculative", "auto"):
        found = engine.generate("def one(x):", strategy=strategy, **options)
        assert found.tokens == Engine(plain, threads=1).generate("def one(x):", **options).tokens


def test_a_corpus_has_to_be_a_file_with_text_in_it(plain: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text(" \n")
    for path, message in ((tmp_path / "none.txt", "is no file"), (tmp_path / "empty.txt", "holds no text")):
        with pytest.raises(PromptError, match=message):
            Engine(plain, draft_corpus=path)
    with pytest.raises(ParameterError, match="draft_corpus must be the path of a file"):
        Engine(plain, draft_corpus=3)  # type: ignore[arg-type]


def test_on_the_command_line(plain: Path, multi: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plainly = ["--max-new-tokens", "30", "--seed", "1", "--temperature", "0"]
    texts = set()
    for options in (
        ["--strategy", "autoregressive"],
        [],
        ["--drafter", "lookup"],
        ["--strategy", "speculative", "--drafter", "lookup", "--draft-corpus", str(corpus)],
    ):
        assert main([str(plain), PROMPT, *plainly, *options]) == 0
        texts.add(capsys.readouterr().out)
    assert len(texts) == 1
    for path, options, message in (
        (plain, ["--drafter", "both"], "needs a bundle with a drafter"),
        (plain, ["--drafter", "none"], "unknown drafter 'none': there are parallel, cp, lookahead, lookup, both"),
        (plain, ["--strategy", "autoregressive", "--draft-corpus", str(corpus)], "it takes no draft corpus"),
        (multi, ["--drafter", "parallel", "--draft-corpus", str(corpus)], "for the drafters lookup and both"),
        (multi, ["--strategy", "dynamo", "--drafter", "lookup"], "it takes no drafter"),
    ):
        assert main([str(path), PROMPT, *options]) == 1
        assert message in capsys.readouterr().err
