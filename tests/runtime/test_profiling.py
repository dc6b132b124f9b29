"""Measuring: on a made-up device whose clock and costs are known, and for real on a tiny bundle."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from support import handmade, profiles

from dynamo_runtime import LAST, Backend, Engine, load_bundle
from dynamo_runtime.cli import profile as cli
from dynamo_runtime.device.acceptance import Acceptances
from dynamo_runtime.device.costs import MeasuredCosts, MeasuredDrafterCosts
from dynamo_runtime.device.inspection import device_key, inspect_device
from dynamo_runtime.device.plan import Planner
from dynamo_runtime.device.profile import Profile, cached_path, profiles_folder
from dynamo_runtime.drafting import Ask
from dynamo_runtime.errors import ParameterError, ProfileError
from dynamo_runtime.interval import Interval
from dynamo_runtime.parallel import ParallelHeads
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.profiling.measure import QUICK, STAGES, measure
from dynamo_runtime.profiling.passes import ROWS, DrafterTimer, PassTimer
from dynamo_runtime.profiling.trials import PROMPTS, Trials, run_backoff
from dynamo_runtime.step import Rows
from dynamo_runtime.strategies import Autoregressive


class FakeDevice:
    """A session whose passes take the time that a cost function says, by a clock that only they move."""

    def __init__(self, cost, resume=lambda skipped: 0.0, length: int = 600):
        self.cost, self.resume, self.max_length = cost, resume, length
        self.now = 0.0
        self.ort_seconds = 0.0
        self.passes = 0
        self.skips_heads = True
        self.bundle = SimpleNamespace(topology=ParallelHeads(2))
        self.cache = SimpleNamespace(length=0, seen=0, rollback=self.rollback)
        self.heads: FakeHeads | None = None
        self.skipped = 0
        self.rng = np.random.default_rng(0)

    def rollback(self, length: int) -> None:
        self.skipped = max(self.skipped - (self.cache.length - length), 0)
        self.cache.length = length

    def step(self, tokens: Sequence[int], rows: Rows = LAST, heads: Rows = LAST) -> SimpleNamespace:
        with_heads = len(heads.of(len(tokens))) > 0
        spent = self.cost(len(tokens), with_heads, self.cache.length) / 1e3
        if with_heads:
            spent += self.resume(self.skipped) / 1e3
        self.skipped = 0 if with_heads else self.skipped + len(tokens)
        self.ort_seconds += 0.9 * self.spend(spent)
        self.cache.length += len(tokens)
        self.passes += 1
        return SimpleNamespace(topk=lambda: None)

    def spend(self, seconds: float) -> float:
        """Move the clock, with jitter, and now and then a hiccup; returns by how much."""
        seconds *= 1 + 0.02 * self.rng.random() + 3 * (self.rng.random() < 0.02)
        self.now += seconds
        return seconds


class FakeHeads:
    """A drafter's graph on such a device; what runs again without a pass in between finds its weights in the cache.

    Attributes:
        drafted: Depths that drafts were made for.
    """

    def __init__(self, device: FakeDevice, layers, draft, conditioned: bool):
        self._device, self._layers, self._draft, self._conditioned = device, layers, draft, conditioned
        self._warm: dict[Any, int] = {}  # what has run behind which pass
        self.seconds = 0.0
        self.drafted: set[int] = set()

    def ahead(self, positions: Sequence[int]) -> SimpleNamespace:
        cache, begin = self._device.cache, min(self._device.cache.seen, positions[0])
        assert positions[0] < cache.length
        self._spend(self._layers(positions[0] + 1 - begin, begin), self._layers)
        cache.seen = max(cache.seen, positions[0] + 1)
        return SimpleNamespace(topk=self._topk)

    def _topk(self, part: int, before: Sequence[int]) -> None:
        assert len(before) == 1
        self.drafted.add(part + 1 if self._conditioned else 0)
        self._spend(self._draft, part)

    def _spend(self, milliseconds: float, what: Any) -> None:
        if self._warm.get(what) == self._device.passes:
            milliseconds /= 3
        self._warm[what] = self._device.passes
        self.seconds += 0.8 * self._device.spend(milliseconds / 1e3)


@pytest.fixture
def device() -> FakeDevice:
    """A device on which a pass takes 2 ms, each row 0.3, each hundred positions 0.5, and heads a quarter of it all."""

    def cost(rows: int, heads: bool, past: int) -> float:
        return (2 + 0.3 * (rows - 1) + past / 200) * (1.25 if heads else 1.0)

    return FakeDevice(cost, lambda skipped: 0.05 * skipped)


@pytest.fixture
def timer(device: FakeDevice) -> PassTimer:
    return PassTimer(device, lambda: device.now)  # type: ignore[arg-type]


def test_the_profile_recovers_the_cost_of_passes(device: FakeDevice, timer: PassTimer) -> None:
    passes = timer.passes([32, 500], 20.0)
    assert {(each.heads, each.rows, each.past) for each in passes} == {
        (heads, rows, past) for heads in (False, True) for rows in ROWS for past in (32, 500)
    }
    for each in passes:
        real = device.cost(each.rows, each.heads, each.past)
        assert each.time.p50 == pytest.approx(real, rel=0.03)
        assert each.inside == pytest.approx(0.9 * real, rel=0.03)
        assert each.time.p50 <= each.time.p90 <= each.time.p99
        assert each.time.count >= 9


def test_two_runs_agree(timer: PassTimer) -> None:
    first, second = (timer.passes([32], 5.0) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        assert one.time.p50 == pytest.approx(other.time.p50, rel=0.05)


def test_the_profile_recovers_what_resuming_costs(timer: PassTimer) -> None:
    found = timer.resume((8, 32, 128, 5000), 10.0)
    assert [each.skipped for each in found] == [8, 32, 128]
    for each in found:
        # The later pass has one position more behind it than the earlier one had.
        assert each.extra == pytest.approx(0.05 * each.skipped, abs=0.1)


def test_the_plan_made_of_the_measured_curve_is_the_best_one(device: FakeDevice, timer: PassTimer) -> None:
    """Measured, then planned with: the number of drafts that the known costs make the best."""
    passes = timer.passes([32, 500], 20.0)
    measured = MeasuredCosts.of(replace(profiles.full(), passes=passes, resume=[], drafting=0.0, overhead=0.0))
    for accepted in (0.15, 0.4, 0.6, 0.9):
        rates = {0: 1 / device.cost(1, False, 64)}
        for drafts in range(1, 5):
            rates[drafts] = sum(accepted**i for i in range(drafts + 1)) / device.cost(1 + drafts, True, 64)
        best = max(rates, key=lambda drafts: rates[drafts])
        known = {(depth, 2): (10_000, int(10_000 * accepted)) for depth in range(1, 5)}
        planner = Planner(measured, Acceptances(4, known), Ask(heads=True))
        drafts = 0
        while planner.drafting and drafts < 4 and planner.worth([0.5] * (drafts + 1)):
            drafts += 1
        assert rates[drafts] > 0.97 * rates[best]
        assert planner.drafting == (best > 0)


def made_up_layers(positions: int, past: int) -> float:
    """Half a millisecond, a hundredth more for each further position, and one for each hundred before."""
    return 0.5 + 0.01 * (positions - 1) + past * 1e-4


@pytest.mark.parametrize("conditioned", [False, True])
def test_the_profile_recovers_what_a_graph_of_heads_costs(
    device: FakeDevice, timer: PassTimer, conditioned: bool
) -> None:
    heads = device.heads = FakeHeads(device, made_up_layers, 0.06, conditioned)
    device.bundle = SimpleNamespace(topology=ParallelHeads(4), drafter=SimpleNamespace(conditioned=conditioned))
    assert timer.resume((8, 32), 1.0) == []
    assert not any(each.heads for each in timer.passes([32], 0.0))
    runs = DrafterTimer(timer, lambda: device.now).runs([32, 500], (4, 16, 128, 5000), 3.0)
    expected = {(positions, past) for positions in (1, 2, 4, 8) for past in (32, 500)} | {(16, 32), (128, 32)}
    assert {(each.positions, each.past) for each in runs.layers} == expected
    for each in runs.layers:
        assert each.time.p50 == pytest.approx(made_up_layers(each.positions, each.past), rel=0.03)
        assert each.inside == pytest.approx(0.8 * each.time.p50, rel=0.03)
        assert each.time.p50 <= each.time.p90 <= each.time.p99 and each.time.count >= 9
    assert [each.depth for each in runs.drafts] == ([1, 2, 3] if conditioned else [0])
    assert heads.drafted == {each.depth for each in runs.drafts}
    assert all(each.time.p50 == pytest.approx(0.06, rel=0.03) for each in runs.drafts)
    making = MeasuredDrafterCosts.of(runs)
    for unseen, past in ((1, 32), (3, 32), (8, 500), (50, 32), (100, 300), (300, 500)):
        wanted = made_up_layers(unseen, past) + (0.0 if conditioned else 0.06)
        assert making.begin(unseen, past) == pytest.approx(wanted, rel=0.05)
    assert making.further == pytest.approx(0.06 if conditioned else 0.0, rel=0.03)


def test_no_time_is_too_short_for_the_least_rounds(timer: PassTimer) -> None:
    assert all(each.time.count == 9 for each in timer.passes([32], 0.0))


LEAST = replace(QUICK, seconds=0.0, thresholds=(0.0, 1.0), read_bytes=1 << 20)


@pytest.fixture(scope="module")
def measured(multi: Path) -> Profile:
    """A real profile of a tiny bundle, in as little time as can be."""
    stages: list[tuple[str, float]] = []
    profile = measure(
        load_bundle(multi),
        Backend(threads=1),
        effort=LEAST,
        progress=lambda stage, share: stages.append((stage, share)),
    )
    assert stages == [("loading", 0.0), *((stage.name, stage.begins) for stage in STAGES), ("done", 1.0)]
    shares = [share for _, share in stages]
    assert shares == sorted(shares)
    return profile


def test_everything_is_measured(measured: Profile, multi: Path) -> None:
    bundle = load_bundle(multi)
    assert (measured.bundle.kind, measured.bundle.n_tokens, measured.threads) == ("parallel", 3, 1)
    assert measured.bundle.graph_sha256 == bundle.graph_sha256
    assert measured.device == inspect_device("cpu")
    assert measured.load_s > 0 and measured.bandwidth > 1e8 and measured.peak_bytes >= measured.steady_bytes > 1e7
    assert {each.rows for each in measured.passes} == {*range(1, 9), 12, 16}
    assert all(0 < each.inside < each.time.p50 for each in measured.passes)
    assert [each.tokens for each in measured.prefill] == [32, 256]
    assert measured.resume == [] and measured.drafter is not None  # the heads have a graph of their own
    assert {each.positions for each in measured.drafter.layers} >= {1, 128}
    assert [each.depth for each in measured.drafter.drafts] == [0]
    assert {"MatMul", "GroupQueryAttention", "TopK"} <= {each.name for each in measured.operators}
    names = [each.name for each in measured.strategies]
    assert names == [
        "plain",
        "speculative, 1 draft",
        "speculative, 2 drafts",
        "speculative, lookup",
        "auto",
        "dynamo",
    ]
    plain = measured.strategies[0]
    assert plain.ratio == Interval(1.0, 1.0, 1.0) and plain.tokens_per_pass.value == 1
    for each in measured.strategies:
        assert each.tokens_per_s.low <= each.tokens_per_s.value <= each.tokens_per_s.high
        assert 1 <= each.tokens_per_pass.value <= 16
        assert set(each.drafters) <= {"lookup", "parallel"} and ("parallel" in each.drafters) == ("draft" in each.name)
        assert each.between_tokens.count > 0
    assert [each.threshold for each in measured.backoff] == [0.0, 1.0]
    assert measured.backoff[0].tokens_per_pass > measured.backoff[1].tokens_per_pass == 1
    assert sum(each.seen for each in measured.acceptance) > 0
    assert all(each.accepted <= each.seen for each in measured.acceptance)
    assert measured.overhead > 0
    assert measured.widths is not None and measured.widths.holds and measured.widths.pasts == [32, 512]


def test_a_profile_reads_back_as_it_was_written(measured: Profile, tmp_path: Path) -> None:
    for profile in (measured, profiles.full(), profiles.apart(), profiles.sparse()):
        profile.save(tmp_path / "profile.json")
        assert Profile.load(tmp_path / "profile.json") == profile
    assert [path.name for path in tmp_path.iterdir()] == ["profile.json"]


def test_a_kept_profile_is_planned_with(measured: Profile, multi: Path, caplog: pytest.LogCaptureFixture) -> None:
    bundle = load_bundle(multi)
    path = cached_path(device_key("cpu"), bundle, 1)
    assert path.parent == profiles_folder()
    assert Engine(multi, threads=1).profile is None
    measured.save(path)
    try:
        assert Engine(multi, threads=1).profile == measured
        assert Engine(multi, threads=2).profile is None
        path.write_text("{}")
        assert Engine(multi, threads=1).profile is None
        assert "schema version None" in caplog.text
    finally:
        path.unlink()


@pytest.mark.parametrize("profiled", [False, True])
def test_auto_writes_the_plain_text(profiled: bool, measured: Profile, multi: Path, plain: Path) -> None:
    """With the profile, by rules of thumb, and with one that makes drafting pay whatever it costs."""
    passes = [replace(each, time=profiles.quantiles(1.0)) for each in measured.passes]
    free = replace(measured, passes=passes, resume=[], drafting=0.0, overhead=0.0, acceptance=[])
    expected = Engine(plain, threads=1).generate("def fib(n):", seed=5, max_new_tokens=80, ignore_eos=True)
    for profile in (measured, free) if profiled else (None,):
        engine = Engine(multi, threads=1, profile=profile)
        found = engine.generate("def fib(n):", seed=5, max_new_tokens=80, ignore_eos=True)
        assert found.tokens == expected.tokens
        assert found.statistics.strategy == "auto"
        if profile is free:
            assert found.statistics.draft_tokens_proposed > 0


def test_auto_is_plain_where_nothing_can_be_drafted(multi: Path, plain: Path, copied) -> None:
    assert Engine(plain, threads=1).generate("x", max_new_tokens=3).statistics.strategy == "auto"  # from the text
    copied.edit(quantization={"lossless": False})
    found = Engine(copied.folder, threads=1).generate("x", max_new_tokens=3)
    assert found.statistics.strategy == "autoregressive"


def test_a_target_speed_becomes_a_threshold(measured: Profile, multi: Path) -> None:
    speeds = {0.0: 3.0, 0.5: 2.0, 1.0: 1.0}
    backoff = [
        replace(profiles.full().backoff[0], threshold=t, speedup=profiles.interval(s)) for t, s in speeds.items()
    ]
    engine = Engine(multi, threads=1, profile=replace(measured, backoff=backoff))
    given = engine.generate("x", strategy="dynamo", backoff_threshold=0.75, seed=2, max_new_tokens=30)
    engine.reset()
    asked = engine.generate("x", strategy="dynamo", target_speedup=1.5, seed=2, max_new_tokens=30)
    assert asked.tokens == given.tokens
    with pytest.raises(ParameterError, match="run dynamo-profile"):
        Engine(multi, threads=1).stream("x", strategy="dynamo", target_speedup=1.5)


def test_a_strategy_of_ones_own(multi: Path) -> None:
    engine = Engine(multi, threads=1)
    parameters = SamplingParameters(temperature=0.0)
    found = engine.generate("x", strategy=Autoregressive(engine.bundle, parameters), max_new_tokens=9)
    engine.reset()
    assert found.tokens == engine.generate("x", strategy="autoregressive", temperature=0.0, max_new_tokens=9).tokens


# --- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def canned(measured: Profile, monkeypatch: pytest.MonkeyPatch) -> list[dict]:
    """The command measures nothing, and what it would have measured with is noted."""
    asked: list[dict] = []

    def fake(bundle, backend, **options):
        options["backend"] = backend
        options["progress"]("passes", 0.5)
        asked.append(options)
        return measured

    monkeypatch.setattr(cli, "measure", fake)
    return asked


def test_the_command_asks_questions(
    canned: list[dict], copied, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a file, or the built-in prompts; by the chat template."""
    (copied.folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    )
    copied.relist()
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\ufeffone\ntwo\n", encoding="utf-8")
    decode, talk = load_bundle(copied.folder).tokenizer.decode, ["--chat", "--system", "s", "--no-keep", "--quick"]
    for flags, read in ((["--prompts", str(prompts)], ["one", "two"]), ([], PROMPTS[: QUICK.texts])):
        assert cli.main([str(copied.folder), *talk, *flags]) == 0
        assert [decode(each) for each in canned[-1]["prompts"]] == [f"system: s\nuser: {each}\n" for each in read]
    capsys.readouterr()
    assert cli.main([str(copied.folder), "--system", "s"]) == 1
    assert capsys.readouterr().err == "dynamo-profile: error: --system and --trust-content are for --chat\n"


def test_the_command_writes_and_keeps(
    canned: list[dict], measured: Profile, multi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = [tmp_path / name for name in ("p.json", "p.csv", "p.html")]
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "one"}\n{"text": "two"}\n')
    arguments = [str(multi), "--quick", "--threads", "1", "--prompts", str(prompts)]
    flags = [part for file in files for part in (f"--{file.suffix[1:]}", str(file))]
    assert cli.main([*arguments, *flags]) == 0
    written = capsys.readouterr()
    assert "Strategies" in written.out and "GroupQueryAttention" in written.out
    assert Profile.load(files[0]) == measured
    assert files[1].read_text().startswith("section,name,variant,unit,value")
    assert files[2].read_text().lstrip().lower().startswith("<!doctype html>")
    asked = canned[0]
    assert (asked["effort"], asked["prompts"], asked["backend"].threads) == (QUICK, ["one", "two"], 1)
    path = cached_path(device_key("cpu"), load_bundle(multi), 1)
    try:
        assert str(path) in written.err
        assert Profile.load(path) == measured
        path.unlink()
        assert cli.main([*arguments, "--no-keep"]) == 0
        assert not path.exists()
    finally:
        path.unlink(missing_ok=True)


def test_the_command_compares(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, scale in (("here", 1.0), ("there", 2.0)):
        profiles.full(scale).save(tmp_path / f"{name}.json")
    files = [str(tmp_path / f"{name}.json") for name in ("here", "there")]
    assert cli.main(["--compare", *files, "--html", str(tmp_path / "both.html")]) == 0
    out = capsys.readouterr().out
    assert "here" in out and "there" in out
    assert (tmp_path / "both.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["/nowhere"], "/nowhere does not exist"),
        (["--compare", "{old}"], "two profiles or more"),
        (["--compare", "{old}", "{old}"], "has schema version 0, this program reads 1 to 3"),
        (["--compare", "{list}", "{list}"], "it is not a JSON object"),
        (["--compare", "{broken}", "{broken}"], "is not a profile"),
        (["--compare", "{half}", "{half}"], "is not a whole profile"),
        (["--compare", "/no.json", "/no.json"], "/no.json cannot be read"),
        (["--compare", "{old}", "{old}", "--json", "x.json"], "no bundle and no --json"),
        (["{multi}", "--json", "/nowhere/p.json"], "there is no folder /nowhere"),
        (["{multi}", "--prompts", "/no.txt"], "/no.txt is not a readable file of prompts"),
        (["{multi}", "--prompts", "{empty}"], "has no prompts"),
        (["{multi}", "--prompts", "{list}.jsonl"], "is not a readable file of prompts"),
        (["{multi}", "--plain", "{multi}"], "is not a plain bundle"),
        (["{multi}", "--threads", "0"], "threads must be a whole number of at least 1"),
        (["{multi}", "--provider-option", "x"], "must be KEY=VALUE"),
        (["{multi}", "--provider-option", "x=1"], "provider options need a provider"),
        (["{multi}", "--graph-optimization", "most"], "optimization must be one of all, extended, basic, none"),
    ],
)
def test_bad_commands(
    arguments: list[str], complaint: str, multi: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = {
        "old": json.dumps({"schema_version": 0}),
        "list": "[1]",
        "broken": "{",
        "half": json.dumps({"schema_version": 1, "device": {}}),
        "empty": "\n\n",
    }
    places = {name: tmp_path / name for name in contents} | {"multi": multi}
    for name, content in contents.items():
        places[name].write_text(content)
    (tmp_path / "list.jsonl").write_text("[1]")
    before = sorted(tmp_path.iterdir())
    assert cli.main([argument.format(**places) for argument in arguments]) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("dynamo-profile: error: ") and complaint in captured.err
    assert captured.err.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_too_short_a_context(multi: Path) -> None:
    bundle = replace(load_bundle(multi), context_length=10)
    with pytest.raises(ProfileError, match="context of 10, too short"):
        measure(bundle, Backend(threads=1), effort=LEAST)


def test_thresholds_that_would_take_too_long_are_left_out(tmp_path: Path) -> None:
    """Four heads without counts: at ε_b = 0 every n-gram would survive."""
    graph = handmade.write_bundle(tmp_path / "four", 4)
    (graph.parent / "cooccurrence.npz").unlink()
    manifest = graph.parent / "dynamo_config.json"
    content = json.loads(manifest.read_text()) | {"files": handmade.listed(graph.parent)}
    manifest.write_text(json.dumps({name: each for name, each in content.items() if name != "sha256"}))
    engine = Engine(graph, threads=1)
    trials = Trials(engine, engine, [[1, 2, 3]], 4)
    assert [each.threshold for each in run_backoff(trials, 0.0, (0.0, 0.9))] == [0.9]
