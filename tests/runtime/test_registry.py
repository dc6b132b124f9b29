"""Drafters by name, and one of one's own written against the public interface alone."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dynamo_runtime import (
    NOTHING,
    Ask,
    Auto,
    Candidates,
    Engine,
    Guesses,
    ParameterError,
    Passed,
    load_bundle,
    register_drafter,
)
from dynamo_runtime.device.costs import Knowledge, Prior
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.registry import DRAFTERS, TOPOLOGIES, can_draft, make_drafter, make_sources
from dynamo_runtime.repeats import Occurrences

EXAMPLE = Path(__file__).parents[2] / "examples/custom_drafter.py"
Echo = runpy.run_path(str(EXAMPLE))["Echo"]
PROMPT = "def fib(n):\n    return fib(n - 1) + fib(n - 2)\n\ndef fib(n):\n"


@pytest.fixture
def registered() -> Iterator[str]:
    """The example's drafter, by a name."""
    register_drafter("echo", lambda bundle, parameters: Echo())
    yield "echo"
    del DRAFTERS["echo"]


def test_a_drafter_registers_once(registered: str) -> None:
    for name in (registered, "parallel", "plain", "lookup", "both"):
        with pytest.raises(ParameterError, match=f"there is a drafter '{name}' already"):
            register_drafter(name, lambda bundle, parameters: Echo())


@pytest.mark.parametrize("strategy", ["speculative", "auto"])
def test_it_drafts_on_any_bundle(multi: Path, plain: Path, registered: str, strategy: str) -> None:
    options = {"seed": 2, "temperature": 0.4, "max_new_tokens": 60, "ignore_eos": True}
    for path in (multi, plain):
        engine = Engine(path, threads=1)
        expected = engine.generate(PROMPT, strategy="autoregressive", **options)
        engine.reset()
        found = engine.generate(PROMPT, strategy=strategy, drafter=registered, **options)
        assert found.tokens == expected.tokens
        if strategy == "speculative":
            assert found.statistics.draft_tokens_proposed > found.statistics.draft_tokens_accepted > 0


def test_the_bundles_own_is_the_default(multi: Path, plain: Path) -> None:
    parameters = SamplingParameters(draft_cooccurrence_weight=0.0)
    bundle = load_bundle(multi)
    assert type(make_drafter(bundle, parameters)) is type(make_drafter(bundle, parameters, "parallel"))
    assert can_draft(bundle) and not can_draft(load_bundle(plain)) and can_draft(load_bundle(plain), Echo())
    for name, message in (("cp", "needs a bundle of that kind, and this is a parallel one"), ("x", "unknown drafter")):
        with pytest.raises(ParameterError, match=message):
            make_drafter(bundle, parameters, name)
    with pytest.raises(ParameterError, match="this is a plain bundle, which has no drafter"):
        make_drafter(load_bundle(plain), parameters)
    with pytest.raises(ParameterError, match=r"draft_tokens must be from 0 .* to 4 here"):
        make_sources(bundle, SamplingParameters(draft_tokens=5), Echo())
    usual = replace(bundle, sampling={"draft_tokens": 9}).parameters()  # named by nobody, so as many as there are
    sources = make_sources(bundle, usual, Echo())
    assert sources.drafter is not None and (sources.drafter.depth, sources.name) == (4, "Echo")


def test_the_text_drafts_where_nothing_else_does(multi: Path, plain: Path) -> None:
    parameters = SamplingParameters(draft_cooccurrence_weight=0.0)
    heads, none = load_bundle(multi), load_bundle(plain)
    for bundle, drafter, all_there_are, name, looks_up in (
        (heads, None, False, "parallel", False),
        (heads, None, True, "parallel", True),
        (heads, "both", False, "parallel", True),
        (heads, "lookup", True, "", True),
        (none, None, False, "", True),
        (none, None, True, "", True),
        (none, Echo(), True, "Echo", False),
    ):
        made = make_sources(bundle, parameters, drafter, all_there_are=all_there_are)
        assert (made.drafter is not None, made.name, made.lookup is not None) == (bool(name), name, looks_up)
    with pytest.raises(ParameterError, match="drafter both needs a bundle with a drafter, and this is a plain one"):
        make_sources(none, parameters, "both")
    with pytest.raises(ParameterError, match="a draft corpus is for the drafters lookup and both"):
        make_sources(heads, parameters, "parallel", corpus=Occurrences([1, 2, 3]))
    assert make_sources(heads, parameters, corpus=Occurrences([1, 2, 3])).lookup is not None


class Wrong:
    """Guesses what is no distribution over the vocabulary."""

    depth, ask = 2, NOTHING

    def __init__(self, ids: list[int], probabilities: list[float]):
        self.guessed = Candidates(np.array(ids), np.array(probabilities))

    def guess(self, passed: Passed) -> Guesses:
        return lambda chosen: self.guessed


@pytest.mark.parametrize(
    ("ids", "probabilities", "message"),
    [
        ([320], [1.0], "a token that is not one of the 320"),
        ([-1], [1.0], "a token that is not one of the 320"),
        ([1, 2], [0.5, 0.6], "do not sum to 1"),
        ([1, 2], [1.5, -0.5], "do not sum to 1"),
        ([1, 2], [1.0], "do not sum to 1"),
    ],
)
def test_a_guess_has_to_be_a_distribution(
    multi: Path, ids: list[int], probabilities: list[float], message: str
) -> None:
    engine = Engine(multi, threads=1)
    with pytest.raises(ParameterError, match=f"drafter Wrong guessed .*{message}"):
        engine.generate(PROMPT, strategy="speculative", drafter=Wrong(ids, probabilities), max_new_tokens=3)


def test_auto_does_not_take_a_drafter_for_the_bundles_own(multi: Path) -> None:
    """What a profile counted of the bundle's drafts says nothing of another drafter's."""
    bundle, parameters = load_bundle(multi), SamplingParameters(draft_cooccurrence_weight=0.0)
    counted = {(depth, bin_): (1000, 0) for depth in (1, 2) for bin_ in range(5)}
    knowledge = Knowledge(Prior(1.0, 0.01, 0.01, 0.0, 0.0), {greedy: counted for greedy in (False, True)})
    assert Auto(bundle, parameters, knowledge=knowledge).ask == NOTHING
    asking = Echo()
    asking.ask = Ask(heads=True)
    assert Auto(bundle, parameters, drafter=asking, knowledge=knowledge).ask == Ask(heads=True)


def test_every_topology_but_plain_has_a_drafter() -> None:
    assert set(TOPOLOGIES) - set(DRAFTERS) == {"plain"}


def test_the_example_runs(multi: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLE, multi], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "draft tokens accepted" in done.stderr
    imported = [line for line in EXAMPLE.read_text().splitlines() if "import" in line and "dynamo_runtime" in line]
    assert imported == [line for line in imported if line.startswith("from dynamo_runtime import ")]
