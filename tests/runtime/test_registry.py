"""Drafters by name, and one of one's own written against the public interface alone."""

import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dynamo_runtime import Engine, ParameterError, load_bundle, register_drafter
from dynamo_runtime.parameters import SamplingParameters
from dynamo_runtime.registry import DRAFTERS, TOPOLOGIES, can_draft, make_drafter

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
    for name in (registered, "parallel", "plain"):
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
    with pytest.raises(ParameterError, match="this is a plain one"):
        make_drafter(load_bundle(plain), parameters)
    with pytest.raises(ParameterError, match="draft_tokens must be from 1 to 4"):
        make_drafter(bundle, SamplingParameters(draft_tokens=5), Echo())


def test_every_topology_but_plain_has_a_drafter() -> None:
    assert set(TOPOLOGIES) - set(DRAFTERS) == {"plain"}


def test_the_example_runs(multi: Path) -> None:
    done = subprocess.run([sys.executable, EXAMPLE, multi], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout
    assert "draft tokens accepted" in done.stderr
    imported = [line for line in EXAMPLE.read_text().splitlines() if "import" in line and "dynamo_runtime" in line]
    assert imported == [line for line in imported if line.startswith("from dynamo_runtime import ")]
