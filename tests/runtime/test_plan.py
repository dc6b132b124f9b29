"""The plan against an exhaustive search over fixed settings, on devices and drafters whose every number is known."""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from support import profiles

from dynamo_runtime import load_bundle
from dynamo_runtime.device.acceptance import Acceptances, bin_of, middle_of
from dynamo_runtime.device.costs import Knowledge, MeasuredCosts, MeasuredDrafterCosts, Prior
from dynamo_runtime.device.plan import Planner, threshold_for
from dynamo_runtime.device.records import Backoff
from dynamo_runtime.device.tuning import Tuning
from dynamo_runtime.drafting import NOTHING, Ask, Guesses, Passed, Proposer
from dynamo_runtime.errors import ParameterError
from dynamo_runtime.interval import Interval
from dynamo_runtime.manifest import DrafterGraph, FileRecord, PassBytes
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.sampling import Candidates
from dynamo_runtime.verification import Draft

DEPTH = 4
HEADS = Ask(heads=True)


@dataclass
class Graph:
    """Costs of a drafter's graph: its layers `layers`, each further position `position`, every draft `further`."""

    layers: float
    further: float = 0.0
    position: float = 0.0

    def begin(self, unseen: float, past: int) -> float:
        return self.layers + self.position * (unseen - 1)


@dataclass
class Device:
    """Costs of a device: a pass takes 1, each further row `row`, heads inside it `heads` of the whole."""

    row: float
    heads: float = 0.0
    resumed: float = 0.0
    drafting: float = 0.0
    overhead: float = 0.0
    making: Graph | None = None

    def step(self, rows: int, heads: bool, past: int) -> float:
        assert self.making is None or not heads
        return (1 + self.row * (rows - 1)) * (1 + self.heads * heads)

    def resume(self, skipped: int) -> float:
        assert self.making is None
        return self.resumed * skipped

    def made(self, unseen: float, drafts: float) -> float:
        """What the drafter's graph costs in a round."""
        return self.making.begin(unseen, 0) + self.making.further * drafts if self.making else 0.0


@dataclass
class Text:
    """A text in which a draft is right with probability `good` or `bad`, and its drafter knows which, more or less."""

    good: float
    bad: float
    share: float  # of good positions

    def draft(self, rng: np.random.Generator) -> tuple[float, float]:
        """Confidence of the next draft, and its real chance."""
        good = rng.random() < self.share
        return (0.9, self.good) if good else (0.3, self.bad)


def decode(planner: Planner, device: Device, text: Text, rounds: int, rng: np.random.Generator) -> tuple[int, float]:
    """Tokens and time of so many passes, as strategy auto makes them."""
    tokens, spent, skipped, unseen = 0, 0.0, 0, 0
    drafts: list[tuple[float, float]] = []
    for past in range(rounds):
        inside = planner.drafting and device.making is None
        spent += device.step(1 + len(drafts), inside, past)
        if inside:
            spent += device.resume(skipped)
        skipped = 0 if planner.drafting else skipped + 1
        accepted = next((i for i, (_, chance) in enumerate(drafts) if rng.random() >= chance), len(drafts))
        planner.judged([confidence for confidence, _ in drafts], accepted)
        tokens += 1 + accepted
        unseen += 1 + accepted
        drafts, made = [], 0
        if planner.drafting:
            while len(drafts) < DEPTH and planner.further([confidence for confidence, _ in drafts]):
                following = text.draft(rng)
                made += 1
                if not planner.worth([*(confidence for confidence, _ in drafts), following[0]]):
                    break
                drafts.append(following)
            spent += device.made(unseen, made)
            unseen = 0
            planner.plan([confidence for confidence, _ in drafts], past)
        else:
            planner.wait(past)
    return tokens, spent


def best_fixed(device: Device, text: Text) -> float:
    """Tokens a time of the best setting that never changes: no drafts and no heads, or d drafts above a confidence.

    By full enumeration over what the next drafts may turn out to be.
    """
    rates = [1.0 / device.step(1, False, 0)]
    kinds = [(0.9, text.good, text.share), (0.3, text.bad, 1 - text.share)]
    for most, least in itertools.product(range(1, DEPTH + 1), (0.0, 0.5)):
        tokens = spent = 0.0
        for drafts in itertools.product(kinds, repeat=most):
            likelihood = math.prod(share for *_, share in drafts)
            kept = next((i for i, (confidence, *_) in enumerate(drafts) if confidence < least), most)
            chances = [chance for _, chance, _ in drafts[:kept]]
            given = 1 + sum(math.prod(chances[: i + 1]) for i in range(kept))
            tokens += likelihood * given
            spent += likelihood * device.step(1 + kept, device.making is None, 0)
            spent += likelihood * device.made(given, min(kept + 1, most))
        rates.append(tokens / spent)
    return max(rates)


DEVICES = {
    "flat": Device(0.03, 0.05),
    "usual": Device(0.14, 0.12),
    "steep": Device(0.45, 0.2),
    "heads are dear": Device(0.1, 0.6),
    "resuming is dear": Device(0.14, 0.12, resumed=0.005),
    "a graph, cheap": Device(0.03, making=Graph(0.05)),
    "a graph, usual": Device(0.1, making=Graph(0.35, position=0.005)),
    "a graph, dear": Device(0.1, making=Graph(0.8)),
    "a graph, and dear rows": Device(0.35, making=Graph(0.54, position=0.005)),
    "conditioned, cheap": Device(0.03, making=Graph(0.05, 0.01)),
    "conditioned, usual": Device(0.1, making=Graph(0.25, 0.05, position=0.005)),
    "conditioned, catching up is dear": Device(0.1, making=Graph(0.15, 0.03, position=0.03)),
    "conditioned, a run is dear": Device(0.05, making=Graph(0.05, 0.3)),
    "conditioned, all is dear": Device(0.2, making=Graph(0.5, 0.4)),
}
TEXTS = {
    "predictable": Text(0.95, 0.6, 0.8),
    "mixed": Text(0.8, 0.15, 0.5),
    "shuffled": Text(0.1, 0.02, 0.3),
    "overconfident": Text(0.4, 0.3, 0.9),
}


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_the_plan_reaches_the_best_fixed_setting(device: Device, text: Text) -> None:
    rng = np.random.default_rng(0)
    planner = Planner(device, Acceptances(DEPTH), HEADS)
    decode(planner, device, text, 300, rng)
    tokens, spent = decode(planner, device, text, 4000, rng)
    assert tokens / spent > 0.97 * best_fixed(device, text)


@pytest.mark.parametrize("device", DEVICES.values(), ids=DEVICES)
def test_a_short_text_that_does_not_pay_loses_little(device: Device) -> None:
    """From nothing but the rule of thumb that half of the drafts are right."""
    text, ratios = TEXTS["shuffled"], []
    for seed in range(20):
        tokens, spent = decode(
            Planner(device, Acceptances(DEPTH), HEADS), device, text, 200, np.random.default_rng(seed)
        )
        ratios.append(tokens / spent / best_fixed(device, text))
    assert np.mean(ratios) > 0.97


@pytest.mark.parametrize("text", [Text(0.35, 0.08, 0.5), Text(0.05, 0.02, 0.3)], ids=["seldom right", "never right"])
def test_what_drafts_did_not_give_counts_and_not_what_was_hoped(text: Text) -> None:
    """Of 100 passes that a drafter does not pay in, four in a hundred at most; by expectations alone it is five."""
    device, ratios = DEVICES["conditioned, usual"], []
    for seed in range(30):
        planner = Planner(device, Acceptances(DEPTH), HEADS)
        tokens, spent = decode(planner, device, text, 100, np.random.default_rng(seed))
        ratios.append(tokens / spent / best_fixed(device, text))
    assert np.mean(ratios) > 0.96


def test_it_follows_a_text_that_changes() -> None:
    device, rng = DEVICES["usual"], np.random.default_rng(1)
    planner = Planner(device, Acceptances(DEPTH), HEADS)
    drafting = []
    for text, share in zip(
        (TEXTS["predictable"], TEXTS["shuffled"], TEXTS["predictable"]), (0.97, 0.96, 0.93), strict=True
    ):
        decode(planner, device, text, 150, rng)
        tokens, spent = decode(planner, device, text, 400, rng)
        drafting.append(planner.drafting)
        assert tokens / spent > share * best_fixed(device, text)
    assert drafting[0] and drafting[2]


def test_nothing_is_drafted_where_every_row_costs_a_pass() -> None:
    device = Device(1.0, 0.3)
    planner = Planner(device, Acceptances(DEPTH), HEADS)
    assert not planner.drafting
    tokens, spent = decode(planner, device, TEXTS["predictable"], 1000, np.random.default_rng(2))
    assert tokens / spent > 0.98


def test_probing_costs_little() -> None:
    """Whatever a probe and coming back cost, the waits between probes make up for it."""
    for device in (Device(1.0, 0.1), Device(1.0, 1.0), Device(1.0, 0.1, resumed=0.004)):
        tokens, spent = decode(
            Planner(device, Acceptances(DEPTH), HEADS), device, Text(0, 0, 1), 3000, np.random.default_rng(3)
        )
        assert 0.98 < tokens / spent <= 1


def test_a_draft_may_pay_only_with_those_behind_it() -> None:
    """A device whose second row is dear and whose third and fourth are free."""

    class Stairs(Device):
        def step(self, rows: int, heads: bool, past: int) -> float:
            return 1.0 + 0.9 * (rows > 1)

    sure = Acceptances(3, {(depth, 4): (100, 95) for depth in (1, 2, 3)})
    planner = Planner(Stairs(0, 0), sure, HEADS)
    assert planner.drafting
    assert planner.worth([0.9])
    assert not Planner(Stairs(0, 0), Acceptances(1, {(1, 4): (100, 80)}), HEADS).worth([0.9])


class Sure:
    """A drafter that guesses one token with a probability, and counts how often it is asked."""

    depth, ask = DEPTH, HEADS

    def __init__(self, probability: float) -> None:
        self.asked = 0
        self._candidates = Candidates(np.array([5, 6]), np.array([probability, 1 - probability]))

    def guess(self, passed: Passed) -> Guesses:
        def candidates(chosen: Sequence[int]) -> Candidates:
            self.asked += 1
            return self._candidates

        return candidates


def proposed(planner: Planner, drafter: Sure) -> list[Draft]:
    """Drafts as strategy auto makes them."""
    proposer = Proposer(drafter, SamplingParameters(), None)
    passed = Passed(None, None, [3], 0)  # type: ignore[arg-type]
    return proposer.propose(passed, np.random.default_rng(0), planner.worth, planner.further)


@pytest.mark.parametrize(("run", "asked"), [(0.01, 4), (0.25, 2), (0.6, 1)])
def test_a_chain_ends_before_a_run_that_is_not_worth_it(run: float, asked: int) -> None:
    """Of drafts that are right six times out of ten, by what a run costs."""
    known = {(depth, 3): (1000, 600) for depth in range(1, DEPTH + 1)}
    planner = Planner(Device(0.02, making=Graph(0.02, run)), Acceptances(DEPTH, known), HEADS)
    drafter = Sure(0.7)
    assert len(proposed(planner, drafter)) == drafter.asked == asked


def test_every_draft_is_made_where_that_costs_nothing() -> None:
    """One run is for all of them; whether they are fed is settled by what they turn out to be."""
    known = {(depth, b): (1000, 950 * (b == 4)) for depth in range(1, DEPTH + 1) for b in range(5)}
    for making in (None, Graph(0.1)):
        planner = Planner(Device(0.2, making=making), Acceptances(DEPTH, known), HEADS)
        assert all(planner.further([0.9] * drafts) for drafts in range(DEPTH))
        drafter = Sure(0.6)
        assert proposed(planner, drafter) == [] and drafter.asked == 1


def test_a_run_may_pay_by_the_few_drafts_that_are_sure() -> None:
    """What a draft turns out to be is known before it is fed: those that are not sure cost no row."""
    known = {(depth, b): (1000, 0) if b < 4 else (500, 475) for depth in (1, 2) for b in (1, 4)}
    device = Device(0.5, making=Graph(0.02, 0.05))
    planner = Planner(device, Acceptances(2, known), HEADS)
    assert planner.drafting  # by a confidence to stop at: always so many drafts do not pay
    assert planner.further([0.9])
    assert planner.worth([0.9, 0.9]) and not planner.worth([0.9, 0.3])


def test_no_drafter_of_ones_own_is_charged_for_the_bundles_graph() -> None:
    """One that asks for no heads costs nothing but what it is fed."""
    known = {(depth, 4): (1000, 800) for depth in range(1, DEPTH + 1)}
    device = Device(0.3, making=Graph(2.0, 1.0))
    assert not Planner(device, Acceptances(DEPTH, known), HEADS).drafting
    free = Planner(device, Acceptances(DEPTH, known), NOTHING)
    assert free.drafting and free.further([0.9])


def test_there_is_no_probe_where_catching_up_costs_more_than_probes_may() -> None:
    for position, rounds, share in ((0.015, 3000, 0.97), (0.1, 1000, 0.999)):
        device = Device(1.0, making=Graph(0.3, position=position))
        tokens, spent = decode(
            Planner(device, Acceptances(DEPTH), HEADS), device, Text(0, 0, 1), rounds, np.random.default_rng(3)
        )
        assert share < tokens / spent <= 1


def test_the_prompt_has_to_be_caught_up_on_too() -> None:
    """The first probe behind a long prompt waits until it costs less than probes may, or there is none."""
    waits = []
    for prompt in (10, 100, 2000):
        planner = Planner(Device(1.0, making=Graph(0.3, position=0.005)), Acceptances(DEPTH), HEADS)
        for waited in range(2000):
            if planner.drafting:
                break
            planner.wait(prompt + waited)
        waits.append(waited + 1)
    assert 10 < waits[0] < waits[1] < 600 and waits[2] == 2000


def test_confidence_is_corrected_by_what_became_of_it() -> None:
    acceptances = Acceptances(2)
    assert acceptances.of(1, 0.9) == pytest.approx(0.9)
    for _ in range(200):
        acceptances.add([0.9, 0.5], 0)
    assert acceptances.of(1, 0.95) < 0.05
    assert acceptances.of(2, 0.5) == pytest.approx(0.5)  # never judged, as the first was always wrong
    assert acceptances.of(2, 0.9) < 0.15  # but others of that confidence were
    assert acceptances.of(1, 0.1) == pytest.approx(0.1)
    assert acceptances.usual(1) < 0.1
    for _ in range(60):
        acceptances.add([0.9, 0.5], 2)
    assert acceptances.of(1, 0.9) > 0.8 and acceptances.of(2, 0.5) > 0.8
    known = Acceptances(1, {(1, bin_of(0.9)): (1000, 200)})
    assert known.of(1, 0.9) == pytest.approx(0.2, abs=0.05)
    assert all(bin_of(middle_of(index)) == index for index in range(5))
    assert (bin_of(0.0), bin_of(1.0)) == (0, 4)


def test_the_curve_is_the_measured_one() -> None:
    curve = MeasuredCosts(
        {(False, 10): [(1, 2.0), (2, 3.0), (4, 4.0)], (False, 110): [(1, 4.0), (2, 5.0), (4, 6.0)]}, [(10, 1.0)], 0, 0
    )
    assert curve.step(2, False, 10) == pytest.approx(3.0)
    assert curve.step(3, False, 10) == pytest.approx(3.5)
    assert curve.step(6, False, 10) == pytest.approx(5.0)  # continued
    assert curve.step(1, False, 60) == pytest.approx(3.0)
    assert curve.step(1, False, 210) == pytest.approx(6.0)
    assert (curve.resume(0), curve.resume(5), curve.resume(20)) == pytest.approx((0.0, 0.5, 2.0))


def test_the_curve_of_a_graph_is_the_measured_one() -> None:
    """Many positions cost more by as much as behind the shortest past, wherever they stand."""
    points = {10: [(1, 0.4), (2, 0.5), (4, 0.7), (104, 10.7)], 110: [(1, 0.6), (2, 0.7), (4, 0.9)]}
    whole = MeasuredDrafterCosts(points, 0.1, 0.0)
    assert whole.further == 0.0
    assert whole.begin(1, 10) == pytest.approx(0.5)
    assert whole.begin(3, 60) == pytest.approx(0.8)
    assert whole.begin(54, 10) == pytest.approx(5.8) and whole.begin(54, 110) == pytest.approx(6.0)
    each = MeasuredDrafterCosts(points, 0.3, 0.1)
    assert (each.begin(1, 10), each.further) == pytest.approx((0.6, 0.1))


@pytest.mark.parametrize("conditioned", [False, True])
def test_a_profile_with_a_graph_is_planned_with(conditioned: bool) -> None:
    runs = profiles.runs(conditioned)
    curve = MeasuredCosts.of(profiles.apart(drafter=runs))
    assert curve.making is not None
    for each in runs.layers:
        once = 0.0 if conditioned else runs.drafts[0].time.p50
        assert curve.making.begin(each.positions, each.past) == pytest.approx(each.time.p50 + once)
    assert curve.making.further == pytest.approx(0.07 if conditioned else 0.0)


def test_a_profile_is_planned_with() -> None:
    profile = profiles.full()
    curve = MeasuredCosts.of(profile)
    for each in profile.passes:
        assert curve.step(each.rows, each.heads, each.past) == pytest.approx(each.time.p50)
    for each in profile.resume:
        assert curve.resume(each.skipped) == pytest.approx(each.extra)
    greedy = [replace(each, greedy=True, accepted=each.seen) for each in profile.acceptance]
    knowledge = Knowledge.of(None, replace(profile, acceptance=[*profile.acceptance, *greedy]))  # type: ignore[arg-type]
    assert knowledge.costs.step(3, True, 512) == curve.step(3, True, 512)
    for temperature, counted in ((0.7, profile.acceptance), (0.0, greedy)):
        known = {(each.depth, bin_of(each.confidence)): (each.seen, each.accepted) for each in counted}
        found, expected = knowledge.acceptances(DEPTH, temperature), Acceptances(DEPTH, known)
        for depth in range(1, DEPTH + 1):
            assert found.usual(depth) == expected.usual(depth)
            assert all(found.of(depth, middle_of(b)) == expected.of(depth, middle_of(b)) for b in range(5))


def test_target_speedup_is_the_largest_threshold_that_is_fast_enough() -> None:
    points = {0.0: 2.4, 0.3: 2.0, 0.6: 1.5, 1.0: 0.9}
    backoff = [Backoff(threshold, 2.0, Interval(speed, speed, speed)) for threshold, speed in points.items()]
    profile = profiles.full(backoff=backoff)
    assert threshold_for(profile, 2.0) == pytest.approx(0.3)
    assert threshold_for(profile, 1.75) == pytest.approx(0.45)
    assert threshold_for(profile, 0.5) == 1.0
    with pytest.raises(ParameterError, match=r"at most 2\.40 times .*not 3 times"):
        threshold_for(profile, 3.0)
    for nothing in (None, profiles.full(backoff=[])):
        with pytest.raises(ParameterError, match="run dynamo-profile"):
            threshold_for(nothing, 1.5)


def test_the_prior_grows_with_the_model() -> None:
    small, large = Prior(0.5, 0.1, 0.1), Prior(50.0, 10.0, 7.0)
    for prior in (small, large):
        costs = [prior.step(rows, heads, 0) for heads in (False, True) for rows in (1, 2, 4)]
        assert costs == sorted(costs) or costs[2] > costs[3]
        assert prior.resume(10) > 0
    assert not Planner(small, Acceptances(2), HEADS).drafting
    assert small.making is None
    assert Planner(large, Acceptances(2), HEADS).drafting


@pytest.mark.parametrize("known", [False, True], ids=["by the files", "by what is read"])
@pytest.mark.parametrize("conditioned", [False, True])
def test_the_prior_of_a_graph_is_by_its_bytes(multi: Path, known: bool, conditioned: bool) -> None:
    """Of a base with 9 MB in 8 layers, and a drafter with 6 MB, a third of it in two more such layers.

    Where heads are told the token in front, half of it is read by every draft.
    """
    bundle = replace(
        load_bundle(multi),
        kv_layers=8,
        precision="fp32",
        drafter=DrafterGraph("drafter.onnx", 2, 2, 8, conditioned),
        pass_bytes=PassBytes(9_000_000, 6_000_000) if known else None,
        files={"model.onnx": FileRecord(9_000_000, ""), "drafter.onnx": FileRecord(6_000_000, "")},
    )
    tuning = Tuning(bytes_per_ms=1e6, run_ms=0.5)
    prior = Prior.of(bundle, tuning)
    assert prior.step(1, False, 0) == pytest.approx(9.0) and prior.step(1, True, 0) == pytest.approx(9.0)
    assert prior.making is not None
    assert prior.making.further == pytest.approx(3.5 if conditioned else 0.0)
    assert prior.making.begin(1, 0) == pytest.approx(3.5 if conditioned else 2.5 + 4.5)
    assert prior.making.begin(3, 0) - prior.making.begin(1, 0) == pytest.approx(2 * 0.14 * (3 if conditioned else 2))
