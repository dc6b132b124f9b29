"""Generations: what is recorded of them, conversations, and going on after an interrupt."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from support import handmade

from dynamo_evaluate.errors import EvaluationError
from dynamo_evaluate.generate import TURN_SEPARATOR, Chat, Experiment, check_length, run
from dynamo_evaluate.measures import base_nll
from dynamo_evaluate.prompts import Prompt
from dynamo_evaluate.results import Results
from dynamo_evaluate.settings import PLAIN, Setting, curve
from dynamo_runtime import BundleError, Engine

PROMPTS = [Prompt("a", ("def f(", "and then"), code=True), Prompt("b", ("for i",))]
SETTINGS = [Setting(PLAIN, "autoregressive", plain=True), *curve([0.1, 1.0]), Setting("auto", "auto")]
SAMPLING: dict[str, Any] = {"temperature": 0.7, "top_k": 20, "repetition_penalty": 1.0}


def go(results: Results, engines: tuple[Engine, Engine]) -> Results:
    run(results, *engines, Experiment(PROMPTS, SETTINGS, 2, SAMPLING, 6, ignore_eos=True, template="> {prompt}"))
    return results


@pytest.fixture(scope="module")
def results(engines: tuple[Engine, Engine]) -> Results:
    return go(Results.start(None, {"command": "generate"}), engines)


def timeless(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Records without their times, in order of what they are of."""
    kept = [{name: value for name, value in record.items() if name != "seconds"} for record in records]
    return sorted(kept, key=lambda r: (r["setting"], r["prompt"], r["turn"], r["seed"]))


def test_every_setting_prompt_turn_and_seed(results: Results) -> None:
    assert len(results.records) == len(SETTINGS) * 2 * (2 + 1)
    for record in results.records:
        assert record["tokens"] == 6 and record["seconds"] > 0
        assert sum(int(size) * count for size, count in record["steps"].items()) == 6
        assert sum(record["steps"].values()) == record["passes"]
        assert ("parsing" in record["measures"]) == (record["prompt"] == "a")


def test_texts_are_the_engines(results: Results, engines: tuple[Engine, Engine]) -> None:
    """A conversation's second turn follows the answer to the first; seeds differ by prompt and by number."""
    found = {(r["setting"], r["prompt"], r["turn"], r["seed"]): r["text"] for r in results.records}
    options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, **SAMPLING}
    text = "> def f("
    for turn, said in enumerate(["", "> and then"]):
        text += said
        engines[1].reset()
        expected = engines[1].generate(text, strategy="autoregressive", seed=2, **options).text
        assert found[PLAIN, "a", turn, 1] == expected
        text += expected + TURN_SEPARATOR
    engines[0].reset()
    expected = engines[0].generate("> for i", strategy="dynamo", backoff_threshold=0.1, seed=1, **options).text
    assert found["dynamo, ε_b 0.1", "b", 0, 0] == expected
    assert found[PLAIN, "b", 0, 0] != found[PLAIN, "b", 0, 1]


def test_one_token_a_pass_and_verified_drafts_write_plains_text(results: Results) -> None:
    """At ε_b 1, and verified, the text is plain decoding's, and so is all that is measured of it."""
    found = {(r["setting"], r["prompt"], r["turn"], r["seed"]): r for r in results.records}
    for (setting, *place), record in found.items():
        if setting in ("auto", "dynamo, ε_b 1"):
            plain = found[(PLAIN, *place)]
            assert record["text"] == plain["text"]
            assert record["measures"]["nll"] == pytest.approx(plain["measures"]["nll"], abs=1e-5)


def test_goes_on_where_it_was(tmp_path: Path, results: Results, engines: tuple[Engine, Engine]) -> None:
    path = tmp_path / "r.jsonl"
    whole = go(Results.start(path, {"command": "generate"}), engines)
    assert timeless(whole.records) == timeless(results.records)
    lines = path.read_text().splitlines(keepends=True)
    whole.close()
    path.write_text("".join(lines[:8]) + lines[8][:30])  # inside a conversation, and inside a line
    again = go(Results.start(path, {"command": "generate"}), engines)
    assert again.records[:7] == whole.records[:7]
    assert timeless(again.records) == timeless(whole.records)
    assert len(Results.load(path).records) == len(whole.records)


TEMPLATE = """{% for m in messages %}{{ m.role[0] }}:{{ m.content }}
{% endfor %}a:"""


def test_questions_go_through_the_chat_template(engines: tuple[Engine, Engine], tmp_path: Path) -> None:
    """Turn by turn, with the answers that were given; likelihoods are those of answers behind what was read."""
    both = []
    for engine in engines:
        folder = tmp_path / engine.bundle.folder.name
        shutil.copytree(engine.bundle.folder, folder)
        handmade.add_file(folder, "chat_template.jinja", TEMPLATE)
        both.append(Engine(folder, provider="cpu", threads=1))
    multi, plain = both
    chat = Chat(system="S")
    experiment = Experiment(PROMPTS, SETTINGS, 2, SAMPLING, 6, ignore_eos=True, chat=chat)
    results = Results.start(None, {"command": "generate", **experiment.record})
    assert results.header["chat"] == {"system": "S", "trust_content": False}
    check_length((multi, plain), experiment)
    run(results, multi, plain, experiment)
    found = {(r["setting"], r["prompt"], r["turn"], r["seed"]): r for r in results.records}
    options: dict[str, Any] = {"max_new_tokens": 6, "ignore_eos": True, **SAMPLING}
    messages: list[dict[str, Any]] = [{"role": "system", "content": "S"}]
    for turn, said in enumerate(PROMPTS[0].turns):
        messages.append({"role": "user", "content": said})
        plain.reset()
        expected = plain.chat(messages, strategy="autoregressive", seed=2, **options)
        record = found[PLAIN, "a", turn, 1]
        assert record["text"] == expected.text
        read = plain.encode(plain.bundle.chat_template.render(messages))
        nll = base_nll(plain, read, expected.tokens)
        assert record["measures"]["nll"] == pytest.approx(nll, abs=1e-5)
        messages.append({"role": "assistant", "content": expected.text})
    assert found["dynamo, ε_b 1", "a", 1, 1]["text"] == found[PLAIN, "a", 1, 1]["text"]
    with pytest.raises(BundleError, match="has no chat template"):
        check_length(engines, experiment)


def test_prompts_that_do_not_fit_are_found_before_the_work(engines: tuple[Engine, Engine]) -> None:
    check_length(engines, Experiment(PROMPTS, SETTINGS, 1, SAMPLING, 30))
    with pytest.raises(EvaluationError, match=r"prompt a has .* tokens"):
        check_length(engines, Experiment(PROMPTS, SETTINGS, 1, SAMPLING, 60))
