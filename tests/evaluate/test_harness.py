"""The bundle in lm-evaluation-harness against the harness's own Hugging Face model, offline, on tasks that lie here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support import handmade

lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from dynamo_evaluate.errors import EvaluationError  # noqa: E402
from dynamo_evaluate.harness import DynamoLM  # noqa: E402
from dynamo_runtime.errors import BundleError, ParameterError, PromptError  # noqa: E402

TASKS = Path(__file__).parent / "tasks"
LONG = "def fib(n):\n    if n < 2:\n        return n\n    return fib(n - 1) + fib(n - 2)\n" * 5
PAIRS = [
    ("def fib(n):\n", "    if n < 2:\n"),
    ("for i in ", "range(10):"),  # the space goes to the continuation
    ("", "class Point:"),
    (LONG, "x = 1"),  # longer than the context
    ("<|endoftext|>for", " i"),
]


@pytest.fixture(scope="module")
def ours(pair: Any) -> DynamoLM:
    return DynamoLM(str(pair.multi), threads=1, provider="cpu")


@pytest.fixture(scope="module")
def theirs(pair: Any) -> HFLM:
    return HFLM(pretrained=str(pair.checkpoint), device="cpu", dtype="float32", batch_size=1)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=i) for i, each in enumerate(arguments)]


def test_registered() -> None:
    assert get_model("dynamo") is DynamoLM


def test_log_likelihoods_are_the_hugging_face_models(ours: DynamoLM, theirs: HFLM) -> None:
    found = ours.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    expected = theirs.loglikelihood(requests("loglikelihood", PAIRS), disable_tqdm=True)
    for (value, greedy), (reference, reference_greedy) in zip(found, expected, strict=True):
        assert value == pytest.approx(reference, rel=1e-5, abs=1e-4)
        assert greedy == reference_greedy


def test_what_is_greedy_is_said_to_be(ours: DynamoLM, theirs: HFLM) -> None:
    """The most likely token behind a text is greedy, wherever it is tokenized there as it was written."""
    contexts = [LONG[:length] for length in range(2, 60, 3)]
    asked = [(context, {"max_gen_toks": 1}) for context in contexts]
    written = ours.generate_until(requests("generate_until", asked), disable_tqdm=True)
    pairs = [(context, text) for context, text in zip(contexts, written, strict=True) if text]
    found, expected = (
        [greedy for _, greedy in model.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)]
        for model in (ours, theirs)
    )
    assert found == expected and any(found) and not all(found)


def test_rolling_log_likelihoods(ours: DynamoLM, theirs: HFLM) -> None:
    texts = [("class Point:\n    pass\n",), (LONG,)]
    found = ours.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    expected = theirs.loglikelihood_rolling(requests("loglikelihood_rolling", texts), disable_tqdm=True)
    assert found == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("strategy", ["auto", "autoregressive", "speculative"])
def test_greedy_texts_of_lossless_strategies(pair: Any, theirs: HFLM, strategy: str) -> None:
    wishes = {"until": ["\n\n"], "max_gen_toks": 12, "do_sample": False}
    asked = [("def fib(n):\n    if", dict(wishes)), ("for i in range(", dict(wishes)), (LONG, dict(wishes))]
    model = DynamoLM(str(pair.multi), strategy=strategy, threads=1, provider="cpu")
    expected = theirs.generate_until(requests("generate_until", asked), disable_tqdm=True)
    assert model.generate_until(requests("generate_until", asked), disable_tqdm=True) == expected
    if strategy != "autoregressive":
        model = DynamoLM(str(pair.multi), strategy=strategy, drafter="lookup", threads=1, provider="cpu")
        assert model.generate_until(requests("generate_until", asked[:2]), disable_tqdm=True) == expected[:2]


def test_dynamo_and_sampling(pair: Any) -> None:
    model = DynamoLM(str(pair.multi), strategy="dynamo", backoff_threshold=0.1, threads=1, provider="cpu")
    wishes = {"until": "zzz", "max_gen_toks": 12, "do_sample": True, "temperature": 1.5}
    first, second = model.generate_until(requests("generate_until", [("def", wishes)] * 2), disable_tqdm=True)
    assert first and first != second
    with pytest.raises(EvaluationError, match="leave no room"):
        model.generate_until(requests("generate_until", [("def", {"max_gen_toks": 96})]), disable_tqdm=True)
    with pytest.raises(EvaluationError, match="which bundle"):
        DynamoLM()
    with pytest.raises(EvaluationError, match="unknown drafter 'heads'"):
        DynamoLM(str(pair.multi), drafter="heads")
    with pytest.raises(ParameterError, match="unknown parameter temprature"):
        DynamoLM(str(pair.multi), temprature=1.0)


def test_tasks_of_the_harness(ours: DynamoLM, theirs: HFLM, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whole tasks, whose data lie beside them: the same accuracies and perplexities."""
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    data = f"dataset_kwargs: {{data_files: {{test: {TASKS / 'next_statement.jsonl'}}}, cache_dir: {tmp_path}}}\n"
    for path in TASKS.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text() + data)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    tasks = ["dynamo_next_statement", "dynamo_rolling", "dynamo_complete"]
    found, expected = (
        lm_eval.simple_evaluate(
            model=model, tasks=tasks, task_manager=manager, bootstrap_iters=0, log_samples=False, verbosity="ERROR"
        )["results"]
        for model in (ours, theirs)
    )
    assert set(found) == set(tasks)
    for task in tasks:
        for name, value in expected[task].items():
            if isinstance(value, float):
                assert found[task][name] == pytest.approx(value, rel=1e-5), (task, name)


TEMPLATE = """{% if 'refuse' in messages[0].content %}{{ raise_exception('No!') }}{% endif %}
{%- for message in messages %}{{ message.role }}: {{ message.content | trim }}
{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"""


def test_chat_templates(pair: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Messages are the very texts of the harness's own model, and so is what is measured of them."""
    for folder in (pair.multi, pair.checkpoint):
        shutil.copytree(folder, tmp_path / folder.name)
        handmade.add_file(tmp_path / folder.name, "chat_template.jinja", TEMPLATE)
    ours = DynamoLM(str(tmp_path / pair.multi.name), threads=1, provider="cpu")
    theirs = HFLM(pretrained=str(tmp_path / pair.checkpoint.name), device="cpu", dtype="float32", batch_size=1)
    assert ours.chat_template(True) == theirs.chat_template(True) == TEMPLATE
    assert ours.chat_template(False) is None
    for messages in (
        [{"role": "user", "content": " x = "}],
        [{"role": "system", "content": "refuse me"}, {"role": "user", "content": "x"}],
        [{"role": "system", "content": "s"}, {"role": "user", "content": "x"}, {"role": "assistant", "content": "y  "}],
    ):
        answered = messages[-1]["role"] == "user"
        expected = theirs.apply_chat_template(messages, add_generation_prompt=answered)
        assert ours.apply_chat_template(messages, add_generation_prompt=answered) == expected
    with pytest.raises(PromptError, match="refuses these messages: No!"):
        ours.apply_chat_template([{"role": "user", "content": "refuse me"}])
    with pytest.raises(BundleError, match="has no chat template"):
        DynamoLM(str(pair.multi), threads=1, provider="cpu").chat_template(True)
    for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    data = f"dataset_kwargs: {{data_files: {{test: {TASKS / 'next_statement.jsonl'}}}, cache_dir: {tmp_path}}}\n"
    for path in TASKS.glob("*.yaml"):
        (tmp_path / path.name).write_text(path.read_text() + data)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found, expected = (
        lm_eval.simple_evaluate(
            model=model,
            tasks=["dynamo_next_statement", "dynamo_complete"],
            task_manager=manager,
            bootstrap_iters=0,
            limit=4,
            apply_chat_template=True,
            verbosity="ERROR",
        )
        for model in (ours, theirs)
    )
    for task, records in expected["samples"].items():
        for ours_of_it, theirs_of_it in zip(found["samples"][task], records, strict=True):
            assert ours_of_it["arguments"] == theirs_of_it["arguments"]
            assert "user: " in str(ours_of_it["arguments"])
    for task, values in expected["results"].items():
        for name, value in values.items():
            if isinstance(value, float):
                assert found["results"][task][name] == pytest.approx(value, rel=1e-5), (task, name)


def test_command_passes_on_to_the_harness() -> None:
    command = [sys.executable, "-m", "dynamo_evaluate.cli", "harness", "run", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert shown.returncode == 0 and "--model_args" in shown.stdout
