"""Made-up generations whose speeds, qualities and same-quality speed-ups can be worked out by hand."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from support import made_up

from dynamo_evaluate import compare, plots, report
from dynamo_evaluate.cells import SPEED, TOKENS_PER_PASS
from dynamo_evaluate.cli import main
from dynamo_evaluate.errors import EvaluationError
from dynamo_evaluate.results import Results
from dynamo_evaluate.settings import PLAIN, Setting
from dynamo_evaluate.summary import ALL, fastest_inside, summarize

THRESHOLDS = [0.5, 0.7, 0.8, 0.9, 1.0]


@pytest.fixture
def results() -> Results:
    return made_up.grid(None, THRESHOLDS)


def test_figures_by_hand(results: Results) -> None:
    """Plain's seeds are at 1.1, 1.0 and 0.9, so one more lies within 4.3027 · 0.1 · √(4/3) = 0.4968 of 1."""
    found = summarize(results)
    assert found.plain["nll"] == pytest.approx((1 - 0.49683, 1 + 0.49683), abs=1e-4)
    half = found.outcomes["dynamo, ε_b 0.5"]
    assert half.speed.value == pytest.approx(2.0) and half.tokens_per_pass.value == 3.0
    assert half.measures["nll"].value == pytest.approx(0.0) and not half.inside["nll"]
    assert half.steps == {3: 1.0}
    assert found.outcomes["dynamo, ε_b 0.8"].inside["nll"]
    assert found.outcomes[PLAIN].speed.value == 1.0
    assert found.prompts == found.wanted == 4


def test_same_quality_speed_up_by_hand(results: Results) -> None:
    """The line 2 - speed leaves plain's spread at 0.5032, a speed of 1.4968; ε_b 0.8, at 1.4, is the last inside."""
    found = summarize(results)
    assert found.same["dynamo", SPEED]["nll"].speed.value == pytest.approx(1.4968, abs=0.003)
    assert found.same["dynamo", SPEED][ALL].speed.value == pytest.approx(1.4968, abs=0.003)
    fastest = fastest_inside(found, "dynamo", "nll")
    assert fastest is not None and fastest.setting["threshold"] == 0.8
    curve = found.curves["dynamo", SPEED]["nll"]
    assert curve.polynomial.convert().coef == pytest.approx([2, -1, 0], abs=1e-9)


def test_only_finished_prompts_count(results: Results) -> None:
    del results.records[-1]
    found = summarize(results)
    assert (found.prompts, found.wanted) == (3, 4)
    assert "3 prompts of 4 (the run is not finished)" in report.conditions(found)
    assert "With 3 seeds that is 2.5 times as wide" in report.conditions(found)
    results.records[:] = results.records[:5]
    with pytest.raises(EvaluationError, match="no prompt yet"):
        summarize(results)


def test_judges_join_the_measures(results: Results) -> None:
    """Scores 8 for plain and 6 for ε_b 0.5; of 12 verdicts 3 wins, 3 ties and 6 losses: 4.5 to 7.5."""
    name = "dynamo, ε_b 0.5"
    for number, record in enumerate([r for r in list(results.records) if r["setting"] in (PLAIN, name)]):
        place = {key: record[key] for key in ("setting", "prompt", "turn", "seed")}
        score = None if number == 0 else 8 if record["setting"] == PLAIN else 6
        results.append({"kind": "score", **place, "score": score, "judge": "j"})
        if record["setting"] == name:
            verdict = "win" if record["prompt"] == "0" else "tie" if record["prompt"] == "1" else "lose"
            results.append({"kind": "pair", **place, "verdict": verdict, "judge": "j"})
    for setting in results.header["settings"]:
        for seed in range(3):
            record = {"setting": setting["name"], "seed": seed, "value": 0.9 + seed / 100}
            results.append({"kind": "mauve", "texts": 4, "features": "f", **record})
    found = summarize(results)
    half = found.outcomes[name]
    assert half.measures["score"].value == 6 and found.outcomes[PLAIN].measures["score"].value == 8
    assert half.measures["win_rate"].value == pytest.approx(5 / 8) and not half.inside["win_rate"]
    assert {verdict: share.value for verdict, share in half.verdicts.items()} == {"win": 0.25, "tie": 0.25, "lose": 0.5}
    assert half.verdicts["lose"].low < 0.5 < half.verdicts["lose"].high
    assert half.measures["mauve"].value == pytest.approx(0.91)
    text = report.text(report.tables(found), report.conditions(found))
    assert "A judge's verdicts against plain" in text and "MAUVE" in text


def test_a_setting_that_never_loses_has_a_rate() -> None:
    results = made_up.grid(None, [0.5, 1.0])
    for prompt in range(4):
        for seed in range(3):
            place = {"setting": "dynamo, ε_b 0.5", "prompt": str(prompt), "turn": 0, "seed": seed}
            results.append({"kind": "pair", **place, "verdict": "win", "judge": "j"})
    assert summarize(results).outcomes["dynamo, ε_b 0.5"].measures["win_rate"].value == pytest.approx(12.5 / 0.5)


def test_half_judged_results(results: Results) -> None:
    """A judge that was stopped early: plain lacks scores at a seed, and only some settings have verdicts."""
    for seed in range(3):
        place = {"prompt": "0", "turn": 0, "seed": seed}
        results.append({"kind": "score", "setting": "dynamo, ε_b 0.5", **place, "score": 4, "judge": "j"})
        if seed:
            results.append({"kind": "score", "setting": PLAIN, **place, "score": 4, "judge": "j"})
        for name in ("dynamo, ε_b 0.5", "dynamo, ε_b 0.7"):
            results.append({"kind": "pair", "setting": name, **place, "verdict": "win", "judge": "j"})
    found = summarize(results)
    assert "score" not in found.plain and set(found.same["dynamo", SPEED]) == {"nll", "win_rate"}
    made = report.tables(found)
    assert "score" not in report.text(made, "") and report.as_json(found)["plain_spread"]["win_rate"] == [1.0, None]


def test_a_single_threshold_has_a_table_and_no_curve(tmp_path: Path) -> None:
    found = summarize(made_up.grid(None, [0.5]))
    made = report.tables(found)
    assert made[0].rows[1][:3] == ["ε_b 0.5", "3.00", "2.00 [2.00, 2.00]"]
    assert plots.draw(found, tmp_path) == []


def test_turns_of_unfinished_conversations_do_not_count() -> None:
    results = made_up.grid(None, [0.5, 1.0], prompts=2)
    results.header["texts"][0]["turns"] = ["first", "second"]
    assert summarize(results).prompts == 1


def test_every_variant_is_drawn(tmp_path: Path) -> None:
    """More variants than colours: pairs of colour and marker stay different."""
    settings = [Setting(PLAIN, "autoregressive", plain=True)]
    settings += [
        Setting(f"variant {i}, ε_b {e}", "dynamo", False, f"variant {i}", e) for i in range(12) for e in (0.2, 0.8)
    ]
    results = Results.start(None, made_up.header(settings, 2, 3))
    for setting in settings:
        for prompt in range(2):
            for seed in range(3):
                figures = {"seconds": 6 + (setting.threshold or 0), "measures": {"nll": 1 + seed / 10}}
                results.append(made_up.generation(setting.name, prompt, seed, **figures))
    plots.draw(summarize(results), tmp_path)
    drawn = (tmp_path / "variants.svg").read_text()
    assert all(f">variant {i}<" in drawn for i in range(12))


def test_win_rate_of_one_is_same_quality() -> None:
    """The rate falls through 1 where wins and losses are equal."""
    results = made_up.grid(None, [0.5, 0.75, 1.0], prompts=4, seeds=3)
    wins = {0.5: 3, 0.75: 6, 1.0: 9}  # of 12, without ties: rates 1/3, 1 and 3 at speeds 2, 1.5 and 1
    for threshold, count in wins.items():
        for i in range(12):
            place = {"setting": f"dynamo, ε_b {threshold:g}", "prompt": str(i % 4), "turn": 0, "seed": i // 4}
            results.append({"kind": "pair", **place, "verdict": "win" if i < count else "lose", "judge": "j"})
    same = summarize(results).same["dynamo", SPEED]["win_rate"].speed
    assert same.value == pytest.approx(1.5, abs=0.01)


def test_json_holds_everything_but_texts(results: Results) -> None:
    found = report.as_json(summarize(results))
    written = json.loads(json.dumps(found, allow_nan=False))
    assert "texts" not in written and written["machine"] == made_up.MACHINE
    assert written["outcomes"]["dynamo, ε_b 0.5"]["speed"]["value"] == 2.0
    (speed_up,) = [each for each in written["same_quality"] if (each["axis"], each["measure"]) == (SPEED, "nll")]
    assert speed_up["value"] == pytest.approx(1.497, abs=0.003)
    assert {each["axis"] for each in written["curves"]} == {SPEED, TOKENS_PER_PASS}


def test_report_says_what_it_was_run_on(results: Results) -> None:
    found = summarize(results)
    markdown = report.markdown(report.tables(found), report.conditions(found))
    assert "a machine" in markdown and "| ε_b 0.5 |" in markdown
    assert "4 prompts (made up) × 3 seeds" in report.conditions(found)


def test_plots_are_drawn(results: Results, tmp_path: Path) -> None:
    files = plots.draw(summarize(results), tmp_path / "plots")
    assert {file.name for file in files} == {
        f"{name}.{kind}" for name in ("curve", "curve_tokens", "steps") for kind in ("png", "svg")
    }
    assert all(file.stat().st_size > 5000 for file in files)
    assert "plain's quality up to 1.50 [" in (tmp_path / "plots" / "curve.svg").read_text()


def test_runs_side_by_side(results: Results) -> None:
    """The same prompts, and half the time everywhere but in plain: speeds over plain are twice as large."""
    other = made_up.grid(None, [*THRESHOLDS[:2], 0.3], machine=made_up.MACHINE | {"processor": "another"})
    for record in other.records:
        if record["setting"] != PLAIN:
            record["seconds"] /= 2
    differs, figures = compare.compare_results(results, other)
    assert ["machine processor", "a machine", "another"] in differs.rows
    rows = figures.rows
    at = rows.index(["dynamo, ε_b 0.5"])
    assert ["dynamo, ε_b 0.8"] not in rows and "paired" in figures.title
    assert rows[at + 2][1:] == ["2.000", "4.000", "+2.000 [+2.000, +2.000]"]
    assert rows[rows.index([PLAIN]) + 2] == ["tokens per second", "1.000", "1.000", "+0.000 [+0.000, +0.000]"]


def test_runs_on_other_prompts_are_not_paired(results: Results) -> None:
    other = made_up.grid(None, THRESHOLDS, prompts=2)
    other.header["prompts"] = {"source": "others", "sha256": "22"}
    assert "not paired" in compare.compare_results(results, other)[-1].title


def test_runs_with_nothing_in_common(results: Results) -> None:
    other = Results.start(None, {"command": "perplexity", "bundles": []})
    with pytest.raises(EvaluationError, match="different commands"):
        compare.compare_results(results, other)


def test_constant_quality_has_no_width() -> None:
    results = made_up.grid(None, [0.5, 1.0], prompts=1)
    for record in results.records:
        record["measures"] = {"nll": 1.0}
    found = summarize(results)
    assert found.same["dynamo", SPEED]["nll"].speed.value == pytest.approx(2.0)
    assert np.isfinite(found.outcomes[PLAIN].measures["nll"].low)


def test_names_of_bundles_are_only_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever stands in them: in a terminal, in Markdown, in a plot."""
    name = '<script src="http://evil.test">|`$x^{$\x1b[31m ![x](http://evil.test)'
    bundle = made_up.BUNDLE | {"name": name}
    path = tmp_path / "r.jsonl"
    made_up.grid(path, [0.1, 0.5, 0.9], bundle=bundle, plain=bundle).close()
    assert main(["report", str(path), "--out", str(tmp_path / "out")]) == 0
    assert "\x1b" not in capsys.readouterr().out
    written = (tmp_path / "out" / "report.md").read_text()
    assert "evil.test" in written and "<script" not in written and "](" not in written and "\x1b" not in written
    drawn = (tmp_path / "out" / "curve.svg").read_text()
    assert "evil.test" in drawn and "<script" not in drawn and "\x1b" not in drawn
